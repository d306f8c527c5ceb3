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
                expanded_length=len(self._expanded(token_ids, [image.grid_thw for image in images])),
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
            return len(self._expanded(token_ids, grids))

    def expanded(self, prompt: Prompt) -> list[int]:
        """Its token ids as the trainer reads them: every image token as often as its picture has patches after merging."""
        return self._expanded(prompt.token_ids, [image.grid_thw for image in prompt.images])

    def response(self, answer: str | tuple[int, ...]) -> list[int]:
        """The tokens of a text and the end token, as of a rollout; prepared token ids are left as they are.

        Raises ValueError for token ids that the tokenizer doesn't have, or that stand for pictures.
        """
        if not isinstance(answer, str):
            return self._known(answer, "prepared response")
        end = self.renderer.tokenizer.eos_token_id
        if end is None:
            raise ValueError(f"the tokenizer of {self.renderer.folder} has no eos_token, with which every response ends")
        with self._lock:
            token_ids = self.renderer.tokenizer.encode(answer, add_special_tokens=False)
        return self._known(token_ids if token_ids[-1:] == [end] else [*token_ids, end], "response")

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, exactly."""
        with self._lock:
            return self.renderer.tokenizer.decode(token_ids, clean_up_tokenization_spaces=False)

    def _token_ids(self, row: Row) -> list[int]:
        if row.token_ids is not None:
            return self._known(row.token_ids, "prepared prompt")
        if len(row.images) > self._max_images:
            raise ValueError(f"{len(row.images)} images, but generate_config.limit_mm_image_per_prompt is {self._max_images}; raise it")
        with self._lock:
            return self.renderer.token_ids(row.messages, len(row.images))

    def _known(self, token_ids: Sequence[int], name: str) -> list[int]:
        if self.renderer.image_token_id in token_ids:
            raise ValueError(f"the {name} has image tokens ({self.renderer.image_token_id}), but no pictures can go with it")
        known = len(self.renderer.tokenizer)
        if unknown := [token for token in token_ids if not 0 <= token < known]:
            raise ValueError(
                f"the {name} has token id {max(unknown)}, but the tokenizer of {self.renderer.folder} ends at {known - 1}:"
                " prepare the data with the tokenizer of this model"
            )
        self.renderer.check_known(token_ids)
        return list(token_ids)

    def _expanded(self, token_ids: list[int], grids: list[GridTHW]) -> list[int]:
        if not grids:
            return token_ids
        return expand_image_tokens(token_ids, grids, self.renderer.image_token_id, self._settings().merge_size)

    def _settings(self) -> ImageSettings:
        assert self.image_settings is not None, "the renderer refuses pictures for a model without image tokens"
        return self.image_settings
