"""One row to one prompt: chat template, pictures, image tokens counted."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from mindspeed_mm_rl.config.plan import DataPlan
from mindspeed_mm_rl.data.chat import ChatRenderer
from mindspeed_mm_rl.data.images import ImageSettings, check_image, expand_image_tokens, grid_of, load_image, prepare, read_image_settings
from mindspeed_mm_rl.data.rows import Row, naming
from mindspeed_mm_rl.types import GridTHW, Prompt


class PromptBuilder:
    """Renders rows for one model; safe to use from several threads.

    Raises ValueError when it is made for a folder without tokenizer, chat template or picture settings.
    """

    def __init__(self, plan: DataPlan) -> None:
        self._max_images = plan.max_images_per_prompt
        self.renderer = ChatRenderer(plan.hf_path, plan.trust_remote_code)
        self.image_settings: ImageSettings | None = None
        """None for a model that reads text alone."""
        if self.renderer.image_token_id is not None:
            self.image_settings = read_image_settings(plan.hf_path, plan.min_pixels, plan.max_pixels)
        # Fast tokenizers refuse ("Already borrowed") to be used by two threads at once.
        self._lock = threading.Lock()

    def build(self, row: Row) -> Prompt:
        """The prompt with prompt_id -1, which the loader replaces. Raises ValueError that names file and row when the row can't be used."""
        with naming(row.where):
            token_ids = self._token_ids(row)
            images = tuple(prepare(load_image(encoded), self._settings()) for encoded in row.images)
            return Prompt(
                prompt_id=-1,
                token_ids=token_ids,
                expanded_length=self._expanded_length(token_ids, [image.grid_thw for image in images]),
                images=images,
                answer=row.answer,
                data_source=row.data_source,
                messages=row.messages,
                extra={**row.extra, "row": row.where},
            )

    def length(self, row: Row) -> int:
        """build(row).expanded_length at a fraction of the price: pictures are checked, not decoded. Raises as build."""
        with naming(row.where):
            token_ids = self._token_ids(row)
            grids = [grid_of(*check_image(encoded), self._settings()) for encoded in row.images]
            return self._expanded_length(token_ids, grids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, exactly."""
        with self._lock:
            return self.renderer.tokenizer.decode(token_ids, clean_up_tokenization_spaces=False)

    def _token_ids(self, row: Row) -> list[int]:
        if row.token_ids is not None:
            return self._prepared(row.token_ids)
        if len(row.images) > self._max_images:
            raise ValueError(f"{len(row.images)} images, but generate_config.limit_mm_image_per_prompt is {self._max_images}; raise it")
        with self._lock:
            return self.renderer.token_ids(row.messages, len(row.images))

    def _prepared(self, token_ids: Sequence[int]) -> list[int]:
        if self.renderer.image_token_id in token_ids:
            raise ValueError(f"the prepared prompt has image tokens ({self.renderer.image_token_id}), but columns hold no pictures")
        if (highest := max(token_ids, default=0)) >= (known := len(self.renderer.tokenizer)):
            raise ValueError(
                f"the prepared prompt has token id {highest}, but the tokenizer of {self.renderer.folder} ends at {known - 1}:"
                " prepare the data with the tokenizer of this model"
            )
        return list(token_ids)

    def _expanded_length(self, token_ids: list[int], grids: list[GridTHW]) -> int:
        if not grids:
            return len(token_ids)
        return len(expand_image_tokens(token_ids, grids, self.renderer.image_token_id, self._settings().merge_size))

    def _settings(self) -> ImageSettings:
        assert self.image_settings is not None, "the renderer refuses pictures for a model without image tokens"
        return self.image_settings
