"""The pictures of one iteration in the object store, for everybody who looks at them: each distinct one once, whatever batches draw it.

prompts --pictures not seen yet--> frozen vision encoder --features--> rollout, log-probs, reference, update, critic
                             '---> (a trained one) --pixels----------> the same, who encode for themselves
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mindspeed_mm_rl.data.pairs import Pair
from mindspeed_mm_rl.types import ImageInput, Prompt
from mindspeed_mm_rl.workers.encoding import Encoder


class SharedPictures:
    """Its tables go out of memory with it."""

    def __init__(self, encoder: Encoder | None) -> None:
        """encoder: of a frozen vision encoder. None: pictures are shared as pixels."""
        self.encoder = encoder
        self.num_encoded = 0
        """Pictures that went through the encoder: as many as there are distinct ones."""
        self._table_of: dict[str, Any] = {}

    @property
    def num_distinct(self) -> int:
        return len(self._table_of)

    def of(self, prompts: Sequence[Prompt | Pair]) -> list[Any]:
        """Object refs of the tables that hold these prompts' pictures: ImageFeatures, or ImageInput without an encoder."""
        distinct = {image.key: image for prompt in prompts for image in prompt.images}
        unseen = {key: image for key, image in distinct.items() if key not in self._table_of}
        if unseen:
            self._add(unseen)
        return list(dict.fromkeys(self._table_of[key] for key in distinct))

    def tables(self) -> list[Any]:
        """Of all prompts so far."""
        return list(dict.fromkeys(self._table_of.values()))

    def _add(self, images: dict[str, ImageInput]) -> None:
        import ray

        if self.encoder is None:
            self._table_of |= dict.fromkeys(images, ray.put(images))
            return
        encoded = self.encoder.encode(images)
        self._table_of |= encoded.table_of
        self.num_encoded += encoded.num_encoded
