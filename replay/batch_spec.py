"""What one batch holds: how many sequences, of which rows. Asked by a training stage, read by the sampler."""

from __future__ import annotations

from dataclasses import dataclass

from system.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSpec:
    """Sequences [B, T] with T = context + length; row i lies i * step positions behind the start.

    stride: keep every stride-th row. A kept row is stored rows verbatim, but is_first also tells of an
    episode that began among the rows skipped before it; their rewards and actions are not in the batch.
    cross_episodes: False draws only starts whose window stays within one episode.
    goal: `Sequence.goal` holds a row drawn uniformly from the last row of the window to the newest
    known row of the same episode; its `step` column tells how far ahead it is.
    pair: k > 0 draws pairs, rows t and t + k: sequences of length 2 without the rows between.

    Raises: ConfigError for a batch that is none.
    """

    batch: int
    length: int  # trained rows per sequence, context excluded
    context: int = 0  # rows before them that only supply state
    stride: int = 1
    cross_episodes: bool = True
    goal: bool = False
    pair: int = 0

    def __post_init__(self) -> None:
        if self.batch < 1 or self.length < 1 or self.context < 0:
            raise ConfigError(
                f"batch ({self.batch}) and length ({self.length}) must be >= 1 and context ({self.context}) "
                ">= 0; choose e.g. batch 16, length 64, context 1"
            )
        if self.stride < 1 or self.pair < 0:
            raise ConfigError(
                f"stride ({self.stride}) must be >= 1 and pair ({self.pair}) >= 0; 1 and 0 keep every row"
            )
        if self.pair and (self.length, self.context, self.stride) != (2, 0, 1):
            raise ConfigError(
                f"pair ({self.pair}) must come with length 2, context 0 and stride 1, not {self.length}, "
                f"{self.context} and {self.stride}: a pair is rows t and t + {self.pair}"
            )
        if self.goal and self.cross_episodes:
            raise ConfigError(
                "goal must come with cross_episodes False: a goal is a later row of the same episode"
            )

    @property
    def time(self) -> int:
        """Rows T of a sequence."""
        return self.context + self.length

    @property
    def step(self) -> int:
        """Positions from one row of a sequence to the next."""
        return self.pair or self.stride

    @property
    def span(self) -> int:
        """Positions from the first to the last row of a sequence, both included: these must be live."""
        return (self.time - 1) * self.step + 1

    @property
    def rows(self) -> int:
        """Trained rows of a batch, as the limiter counts them."""
        return self.batch * self.length
