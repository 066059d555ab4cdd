"""The prompt source: groups of samples in a shuffled, resumable order; and evaluation sets in file order.

Cheap faults of all rows are found when the data is opened; pictures are opened when their row's turn comes.
Either way a fault names file and row. Calls block (decoding, network): an event loop makes them in a worker
thread.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from slime.arguments import Args
from slime.data.errors import DataError
from slime.data.images import Picture
from slime.data.picture_store import PictureStore
from slime.data.rows import PreparedPrompt, RowPreparer
from slime.utils.types import Sample

PREPARE_THREADS = 4


class PromptSource:
    """Yields groups of samples from `--prompt-data`, epoch after epoch.

    `bad_rows` counts rows that were skipped so far (`--bad-rows skip`), each time their turn came. The
    pictures of the last groups that were asked for stay in the store until the next ones are.
    """

    def __init__(self, args: Args, processor: Any, pictures: PictureStore) -> None:
        teachers = {args.opd_teacher_key: args.named_teachers} if args.opd_teachers else None
        self._preparer = RowPreparer(args, args.prompt_data, processor, pictures, teachers=teachers)
        self._held: list[Picture] = []
        self._samples_per_prompt = args.n_samples_per_prompt
        self._skip = args.bad_rows == "skip"
        self._seed = args.seed if args.rollout_shuffle else None
        self._epoch = 0
        self._position = 0
        self._groups = 0
        self._order = self._epoch_order()
        self.bad_rows = 0

    def __len__(self) -> int:
        """Return the number of rows of one epoch, bad ones included."""
        return len(self._preparer)

    def next_groups(self, count: int) -> list[list[Sample]]:
        """Return the next `count` prompts, each as a group of `--n-samples-per-prompt` samples.

        Raises:
            BadRow: a row cannot be used and `--bad-rows` is refuse.
            DataError: a whole epoch has no usable row.
        """
        groups: list[list[Sample]] = []
        held: list[Picture] = []
        bad_in_a_row = 0
        with ThreadPoolExecutor(PREPARE_THREADS, thread_name_prefix="slime-data") as pool:
            while len(groups) < count:
                turns = [self._advance() for _ in range(count - len(groups))]
                for outcome in pool.map(self._preparer.try_prepare, turns):
                    if isinstance(outcome, PreparedPrompt):
                        bad_in_a_row = 0
                        groups.append(self._group(outcome))
                        held += outcome.pictures
                        continue
                    if not self._skip:
                        raise outcome
                    self.bad_rows += 1
                    bad_in_a_row += 1
                    if bad_in_a_row >= len(self):
                        raise DataError(
                            f"no row of {self._preparer.source} can be used; the last one: {outcome}"
                        )
        self._held = held
        return groups

    def state_dict(self) -> dict[str, Any]:
        """Return where the source stands, as plain data."""
        return {
            "epoch": self._epoch,
            "position": self._position,
            "groups": self._groups,
            "bad_rows": self.bad_rows,
            "rows": len(self),
            "fingerprint": self._preparer.fingerprint,
            "shuffle_seed": self._seed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            DataError: the data or its order is another than it was.
        """
        if (state["rows"], state["fingerprint"]) != (len(self), self._preparer.fingerprint):
            raise DataError(
                f"the checkpoint was at row {state['position']} of a data set of {state['rows']} rows, and "
                f"--prompt-data {self._preparer.source} has {len(self)} rows or other contents. Use the "
                "data of that run, or start a new run without --load."
            )
        if state["shuffle_seed"] != self._seed:
            raise DataError(
                f"the checkpoint's prompts are ordered by shuffle seed {state['shuffle_seed']} and this "
                f"run's by {self._seed} (None: not shuffled). Use the same --seed and --rollout-shuffle."
            )
        self._epoch, self._position = state["epoch"], state["position"]
        self._groups, self.bad_rows = state["groups"], state["bad_rows"]
        self._order = self._epoch_order()

    def _epoch_order(self) -> Sequence[int]:
        """Return the order of rows in this epoch, from seed and epoch alone."""
        if self._seed is None:
            return range(len(self))
        order = list(range(len(self)))
        random.Random(f"{self._seed}/{self._epoch}").shuffle(order)
        return order

    def _advance(self) -> int:
        """Return the next row's index and step on, into the next epoch where this one ends."""
        if self._position == len(self._order):
            self._epoch += 1
            self._position = 0
            self._order = self._epoch_order()
        self._position += 1
        return self._order[self._position - 1]

    def _group(self, prompt: PreparedPrompt) -> list[Sample]:
        group = prompt.group(self._groups, self._samples_per_prompt)
        self._groups += 1
        return group


class EvalSet:
    """A held-out set, whole and in file order. It holds its encoded pictures for the rest of the run."""

    def __init__(self, name: str, path: str, args: Args, processor: Any, pictures: PictureStore) -> None:
        self.name = name
        self.bad_rows = 0
        """Rows that were left out (`--bad-rows skip`)."""
        self._preparer = RowPreparer(args, path, processor, pictures, blank=args.eval_blank_images)
        self._samples_per_prompt = args.n_samples_per_eval_prompt
        self._skip = args.bad_rows == "skip"
        self._prepared: list[PreparedPrompt] | None = None

    def __len__(self) -> int:
        """Return the number of rows, bad ones included."""
        return len(self._preparer)

    def samples(self) -> list[Sample]:
        """Return fresh samples of every usable row, `--n-samples-per-eval-prompt` of each.

        Raises:
            BadRow: a row cannot be used and `--bad-rows` is refuse.
            DataError: no row can be used.
        """
        if self._prepared is None:
            self._prepared = self._prepare_all()
        return [
            sample
            for number, prompt in enumerate(self._prepared)
            for sample in prompt.group(number, self._samples_per_prompt)
        ]

    def _prepare_all(self) -> list[PreparedPrompt]:
        """Prepare every row once; the pictures stay encoded until somebody asks for pixels."""
        prepared: list[PreparedPrompt] = []
        with ThreadPoolExecutor(PREPARE_THREADS, thread_name_prefix="slime-eval-data") as pool:
            for outcome in pool.map(self._preparer.try_prepare, range(len(self))):
                if isinstance(outcome, PreparedPrompt):
                    prepared.append(outcome)
                elif self._skip:
                    self.bad_rows += 1
                else:
                    raise outcome
        if not prepared:
            raise DataError(f"no row of {self._preparer.source} can be used.")
        return prepared
