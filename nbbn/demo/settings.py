"""How the demo trains."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """How to train. docs/demo.md tells how the learning rate was chosen.

    Attributes
    ----------
    steps : int
        How many mini-batches.
    learning_rate : float
        Each parameter moves by this times its gradient.
    seed : int
        Decides the first weights, the split of the images and the order of the mini-batches.
    batch_size : int
        Images in a mini-batch.
    record_every : int
        Steps from one record to the next.
    """

    steps: int = 300
    learning_rate: float = 0.1
    seed: int = 0
    batch_size: int = 64
    record_every: int = 5

    def records(self, step: int) -> bool:
        """Return whether something is recorded at this step: the first and the last, and some between."""
        return step in (1, self.steps) or step % self.record_every == 0
