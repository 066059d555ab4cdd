"""From one row to a prepared prompt: columns, checks, pictures, template, length limit."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from slime.arguments.data import DataArgs
from slime.data.columns import column_problems, columns_of, read_text
from slime.data.errors import BadRow, DataError
from slime.data.expand import expanded_length
from slime.data.images import (
    Picture,
    PictureAccess,
    load_image,
    picture_key,
    pixel_limits,
    prepare_picture,
)
from slime.data.picture_store import PictureStore
from slime.data.prompts import PromptBuilder, PromptDraft, PromptError
from slime.data.reader import RowRef, data_folder, read_rows
from slime.utils.pictures import BadImageError, blank_like, open_encoded
from slime.utils.types import Sample


@dataclass(frozen=True)
class PreparedPrompt:
    """A prompt with all that its samples share."""

    text: str
    tokens: list[int]
    """Wire form: one image pad a picture."""
    label: str | None
    pictures: list[Picture] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)

    def group(self, group_index: int, size: int) -> list[Sample]:
        """Return `size` fresh samples, numbered as those of group `group_index`.

        Token list and metadata are each sample's own; the opened pictures are the group's.
        """
        images = [open_encoded(picture) for picture in self.pictures]
        return [
            Sample(
                group_index=group_index,
                index=group_index * size + number,
                prompt=self.text,
                tokens=list(self.tokens),
                label=self.label,
                multimodal_inputs={"images": images} if images else None,
                multimodal_train_inputs=self._train_inputs() if images else None,
                metadata=dict(self.metadata),
            )
            for number in range(size)
        ]

    def _train_inputs(self) -> dict[str, Any]:
        return {
            "image_hashes": [picture.sha256 for picture in self.pictures],
            "image_grid_thw": [picture.grid_thw for picture in self.pictures],
        }


class RowPreparer:
    """Opens a data set, checks every row as far as that is cheap, and prepares rows on demand."""

    def __init__(
        self,
        args: DataArgs,
        source: str,
        processor: Any,
        store: PictureStore,
        *,
        blank: bool = False,
        teachers: Mapping[str, Collection[str]] | None = None,
    ) -> None:
        """Read and check the rows.

        Args:
            args: the data flags.
            source: file, folder or hub name of the rows.
            processor: the student's.
            store: where prepared pictures are kept.
            blank: make every picture white.
            teachers: entry of the metadata -> the values that it may have (`--opd-teachers`); None allows
                all.
        """
        self.source = source
        self._teachers = teachers or {}
        self._args = args
        self._store = store
        self._blank = blank
        self._image_processor = processor.image_processor
        self._merge_size = 1 if processor.image_processor is None else processor.image_processor.merge_size
        self._access = PictureAccess(
            root=data_folder(source) if args.image_root is None else Path(args.image_root),
            named=args.image_root is not None,
            remote=args.allow_remote_images,
        )
        self._recipe = (blank, args.image_min_pixels, args.image_max_pixels)
        """What a prepared picture depends on besides its source; the processor is the run's."""
        self._image_column = args.multimodal_keys.get("image")
        self._rows = read_rows(source, columns_of(args))
        self._require_columns()
        try:
            self._builder = PromptBuilder(
                processor, apply_chat_template=args.apply_chat_template, system_prompt=args.system_prompt
            )
            if self._image_processor is not None:
                pixel_limits(self._image_processor, args.image_min_pixels, args.image_max_pixels)
        except (PromptError, BadImageError) as error:
            raise DataError(str(error)) from error
        self._known_bad: dict[int, BadRow] = {}
        self.fingerprint = self._check_all()

    def __len__(self) -> int:
        return len(self._rows)

    def try_prepare(self, index: int) -> PreparedPrompt | BadRow:
        """Return the prepared prompt of a row, or what is wrong with it. Safe for threads."""
        if index in self._known_bad:
            return self._known_bad[index]
        try:
            return self._prepare(self._rows[index])
        except BadRow as error:
            return error

    def _require_columns(self) -> None:
        """Refuse a file that lacks a column in all its rows: a flag is wrong, not a row."""
        for shard in {id(row.shard): row.shard for row in self._rows}.values():
            for problem, remedy in column_problems(shard, self._args):
                raise DataError(f"{problem}. {remedy}")

    def _check_all(self) -> str:
        """Note every row whose text is bad, or raise the first; return a hash of what the rows say."""
        digest = hashlib.sha256()
        for index, row in enumerate(self._rows):
            try:
                prompt, label, metadata = read_text(row, self._args)
                self._require_teacher(row, metadata)
                pictures = [None] * self._count_pictures(row)
                self._draft(row, prompt, pictures)
                said = _bytes_of(row, [prompt, label, len(pictures)])
            except BadRow as error:
                if self._args.bad_rows == "refuse":
                    raise
                self._known_bad[index] = error
                said = error.why.encode("utf-8", "replace")
            digest.update(hashlib.sha256(said).digest())
        if len(self._known_bad) == len(self._rows):
            raise DataError(f"no row of {self.source} can be used; the first one: {self._known_bad[0]}")
        return digest.hexdigest()

    def _require_teacher(self, row: RowRef, metadata: Mapping[str, Any]) -> None:
        """Refuse a row that no teacher would score, now and not in the rollout that meets it."""
        for key, names in self._teachers.items():
            if metadata.get(key) not in tuple(names):
                raise DataError(
                    f"{row.file}, row {row.number}: {key} is {metadata.get(key)!r} in its metadata, and "
                    f"--opd-teachers names {', '.join(names)}. Name a teacher for it, or choose the entry "
                    "that names one by --opd-teacher-key."
                )

    def _count_pictures(self, row: RowRef) -> int:
        """Return the number of pictures of a row without reading them."""
        if self._image_column is None:
            return 0
        count = row.shard.count(row.index, self._image_column)
        if count is None:
            raise row.bad(f"no column {self._image_column!r} (--multimodal-keys).")
        return count

    def _draft(self, row: RowRef, prompt: Any, pictures: Sequence[Any]) -> PromptDraft:
        try:
            draft = self._builder.draft(prompt, pictures)
        except PromptError as error:
            raise row.bad(str(error)) from error
        if draft.pictures and self._image_processor is None:
            raise row.bad(
                "the row has pictures and the model has no vision part; pass --multimodal-keys '{}'."
            )
        return draft

    def _prepare(self, row: RowRef) -> PreparedPrompt:
        prompt, label, metadata = read_text(row, self._args)
        draft = self._draft(row, prompt, self._picture_sources(row))
        pictures = [self._picture(row, number, source) for number, source in enumerate(draft.pictures, 1)]
        try:
            text, tokens = self._builder.render(draft)
        except PromptError as error:
            raise row.bad(str(error)) from error
        self._limit_length(row, tokens, pictures)
        return PreparedPrompt(
            text=text,
            tokens=tokens,
            label=label,
            pictures=pictures,
            metadata={**metadata, "data_file": row.file, "data_row": row.number},
        )

    def _picture_sources(self, row: RowRef) -> list[Any]:
        if self._image_column is None:
            return []
        value = row.get([self._image_column]).get(self._image_column)
        if value is None:
            return []
        return value if isinstance(value, list) else [value]

    def _picture(self, row: RowRef, number: int, source: Any) -> Picture:
        """Return one picture of a row as the store has it, prepared when this is its first turn."""
        try:
            key = picture_key(source, self._access)
            return self._store.get((key, *self._recipe), lambda: self._make(source))
        except BadImageError as error:
            raise row.bad(f"picture {number}: {error}") from error

    def _make(self, source: Any) -> Picture:
        image = load_image(source, self._access)
        if self._blank:
            image = blank_like(image)
        args = self._args
        return prepare_picture(image, self._image_processor, args.image_min_pixels, args.image_max_pixels)

    def _limit_length(self, row: RowRef, tokens: Sequence[int], pictures: Sequence[Picture]) -> None:
        limit = self._args.max_prompt_length
        if limit is None:
            return
        length = expanded_length(tokens, [picture.grid_thw for picture in pictures], self._merge_size)
        if length > limit:
            raise row.bad(
                f"the prompt has {length} tokens, picture tokens included, and --rollout-max-prompt-len is "
                f"{limit}."
            )


def _bytes_of(row: RowRef, said: Any) -> bytes:
    try:
        return orjson.dumps(said, default=str, option=orjson.OPT_NON_STR_KEYS)
    except TypeError as error:
        raise row.bad(f"the prompt holds what cannot be written as JSON: {error}.") from error
