"""Problems whose optimal return is known: what a learning algorithm must reach, and what chance alone gives.

| `esper_simic/…` | tests | observation | action | episode ends | optimum | random |
|---|---|---|---|---|---|---|
| `Bandit-v0` | learning at all | `Box(1)` | `Discrete(4)` | after 1 step | 0.8 | 0.5 |
| `Chain-v0` | exploring, discounting | `Discrete(9)` | `Discrete(2)` | at either end; cut at 100 | 1 | 0.400 |
| `GridWorld-v0` | states, time limits | `Discrete(16)` | `Discrete(4)` | goal, pit; cut at 50 | 0.936 | −0.660 |
| `Catch-v0` | credit over time | `Box(10, 5)` | `Discrete(3)` | after 9 steps | 1 | −0.6 |
| `Target-v0` | real-valued actions | `Box(3)` | `Box(2)` | after 5 steps | −0.25 | −6.23 |
| `Recall-v0` | memory | `MultiBinary(3)` | `Discrete(2)` | after 6 steps | 1 | 0 |

Returns are undiscounted and expected over the chance of the start. Tests prove every figure by enumeration.
"""

from __future__ import annotations

from typing import Any, ClassVar, Final

import numpy as np
import numpy.typing as npt
from gymnasium.spaces import Box, Discrete, MultiBinary

from esper_simic.worlds.known_answer import Bools, KnownAnswerEnv, KnownAnswerVectorEnv, Lanes

Array = npt.NDArray[Any]


class BanditVectorEnv(KnownAnswerVectorEnv):
    """Four arms, one pull: arm a pays 1 with probability `PAYS[a]`, else 0.

    The best policy always pulls the last arm and gets 0.8; the random one gets 0.5.
    """

    PAYS: Final = (0.2, 0.4, 0.6, 0.8)
    OPTIMAL_RETURN = 0.8
    RANDOM_RETURN = 0.5
    DRAWS = 1
    single_space = Box(0.0, 1.0, (1,), dtype=np.float32)
    single_actions = Discrete(len(PAYS))

    def begin(self, lanes: Lanes, chance: Array) -> None:
        """See `KnownAnswerVectorEnv`."""
        if len(lanes) == self.num_envs:
            self._luck = np.zeros(self.num_envs)
        self._luck[lanes] = chance[:, 0]

    def observe(self) -> Array:
        """Nothing is to be seen: a 1."""
        return np.ones((self.num_envs, 1), dtype=np.float32)

    def move(self, actions: Array) -> tuple[Array, Bools]:
        """Pull."""
        paid = self._luck < np.array(self.PAYS)[actions]
        return paid.astype(np.float64), np.ones(self.num_envs, dtype=bool)


class ChainVectorEnv(KnownAnswerVectorEnv):
    """Cells 0 to 8 in a row, from cell 2 one left (0) or right (1): cell 0 ends with 0.2, cell 8 with 1.

    The near end tempts. The best policy goes right and gets 1. The random walk ends right with probability 2/8 (the
    gambler's ruin), which makes 0.2 + 0.8 / 4 = 0.4, less what walks miss that are cut after 100 steps: 0.399813.
    """

    CELLS: Final = 9
    START: Final = 2
    NEAR: Final = 0.2
    OPTIMAL_RETURN = 1.0
    RANDOM_RETURN = 0.3998134
    DRAWS = 0
    single_space = Discrete(CELLS)
    single_actions = Discrete(2)

    def begin(self, lanes: Lanes, chance: Array) -> None:
        """See `KnownAnswerVectorEnv`."""
        if len(lanes) == self.num_envs:
            self._cell = np.zeros(self.num_envs, dtype=np.int64)
        self._cell[lanes] = self.START

    def observe(self) -> Array:
        """The cell."""
        return self._cell.copy()

    def move(self, actions: Array) -> tuple[Array, Bools]:
        """One cell on."""
        self._cell += np.where(actions == 1, 1, -1)
        left, right = self._cell == 0, self._cell == self.CELLS - 1
        return np.where(right, 1.0, np.where(left, self.NEAR, 0.0)), left | right


class GridWorldVectorEnv(KnownAnswerVectorEnv):
    """A 4 × 4 grid, cells 0 to 15 by rows; up, right, down, left (0 to 3) move one cell, against a wall none.

    A step costs 0.02. Cell 15 is the goal: 1 more, and the end; cell 6 is a pit: 1 less, and the end. An episode begins
    in each of the other 14 cells with equal chance, and is cut after 50 steps.

    The best policy walks the shortest way round the pit, 45/14 steps in the mean, and gets 1 − 0.02 · 45/14 = 0.935714.
    The random one gets −0.660292.
    """

    SIDE: Final = 4
    GOAL: Final = 15
    PIT: Final = 6
    STEP_COST: Final = 0.02
    STARTS: Final = (*range(6), *range(7, 15))
    MOVES: Final = ((-1, 0), (0, 1), (1, 0), (0, -1))
    OPTIMAL_RETURN = 1 - STEP_COST * 45 / 14
    RANDOM_RETURN = -0.6602917
    DRAWS = 1
    single_space = Discrete(SIDE * SIDE)
    single_actions = Discrete(len(MOVES))

    def begin(self, lanes: Lanes, chance: Array) -> None:
        """See `KnownAnswerVectorEnv`."""
        if len(lanes) == self.num_envs:
            self._cell = np.zeros(self.num_envs, dtype=np.int64)
        self._cell[lanes] = np.array(self.STARTS)[(chance[:, 0] * len(self.STARTS)).astype(np.int64)]

    def observe(self) -> Array:
        """The cell."""
        return self._cell.copy()

    def move(self, actions: Array) -> tuple[Array, Bools]:
        """One cell on, where there is one."""
        step = np.array(self.MOVES)[actions]
        row = np.clip(self._cell // self.SIDE + step[:, 0], 0, self.SIDE - 1)
        column = np.clip(self._cell % self.SIDE + step[:, 1], 0, self.SIDE - 1)
        self._cell = row * self.SIDE + column
        goal, pit = self._cell == self.GOAL, self._cell == self.PIT
        return goal.astype(np.float64) - pit - self.STEP_COST, goal | pit


class CatchVectorEnv(KnownAnswerVectorEnv):
    """A ball falls down a board of 10 rows and 5 columns; a paddle in the lowest row moves left, stays, moves right.

    The ball starts in a column drawn with equal chance and falls one row a step; the paddle starts in the middle. After
    9 steps the ball is in the lowest row: 1 where the paddle is, else −1. The board is seen: 1 at ball and paddle.

    The best policy gets 1. The random one is where the ball falls one time in five, wherever it is: 1/5 − 4/5 = −0.6.

    Source: Mnih et al., "Recurrent models of visual attention", 2014, section 4.2; sizes as in bsuite (Osband et al.,
    2020).
    """

    ROWS: Final = 10
    COLUMNS: Final = 5
    OPTIMAL_RETURN = 1.0
    RANDOM_RETURN = -0.6
    DRAWS = 1
    single_space = Box(0.0, 1.0, (ROWS, COLUMNS), dtype=np.float32)
    single_actions = Discrete(3)

    def begin(self, lanes: Lanes, chance: Array) -> None:
        """See `KnownAnswerVectorEnv`."""
        if len(lanes) == self.num_envs:
            self._ball, self._paddle = np.zeros((2, self.num_envs), dtype=np.int64)
            self._rows = np.arange(self.num_envs)
        self._ball[lanes] = (chance[:, 0] * self.COLUMNS).astype(np.int64)
        self._paddle[lanes] = self.COLUMNS // 2

    def observe(self) -> Array:
        """The board."""
        board = np.zeros((self.num_envs, self.ROWS, self.COLUMNS), dtype=np.float32)
        board[self._rows, self.ROWS - 1, self._paddle] = 1
        board[self._rows, np.minimum(self.elapsed, self.ROWS - 1), self._ball] = 1
        return board

    def move(self, actions: Array) -> tuple[Array, Bools]:
        """The paddle moves, the ball falls."""
        self._paddle = np.clip(self._paddle + actions - 1, 0, self.COLUMNS - 1)
        down = self.elapsed >= self.ROWS - 1
        return np.where(down, np.where(self._ball == self._paddle, 1.0, -1.0), 0.0), down


class TargetVectorEnv(KnownAnswerVectorEnv):
    """A point in the plane is to be moved to the origin: an action is its displacement, at most 0.5 either way.

    It starts anywhere in [−1, 1]² with equal chance; a step's reward is −(|x| + |y|) after the move; 5 steps are an
    episode. Seen are x, y and the share of the steps that remains.

    The best policy goes straight there as fast as it may: after one step |x| is max(u − 1/2, 0) with u uniform in
    [0, 1], 1/8 in the mean, after two it is 0, and so it is with |y|: −2/8. The random one displaces uniformly and gets
    −167459/26880 = −6.229874.
    """

    STEPS: Final = 5
    REACH: Final = 0.5
    OPTIMAL_RETURN = -0.25
    RANDOM_RETURN = -167459 / 26880
    DRAWS = 2
    single_space = Box(
        np.array([-1 - STEPS * REACH, -1 - STEPS * REACH, 0], dtype=np.float32),
        np.array([1 + STEPS * REACH, 1 + STEPS * REACH, 1], dtype=np.float32),
        dtype=np.float32,
    )
    single_actions = Box(-REACH, REACH, (2,), dtype=np.float32)

    def begin(self, lanes: Lanes, chance: Array) -> None:
        """See `KnownAnswerVectorEnv`."""
        if len(lanes) == self.num_envs:
            self._point = np.zeros((self.num_envs, 2))
        self._point[lanes] = 2 * chance - 1

    def observe(self) -> Array:
        """Where the point is, and how much time is left."""
        left = 1 - self.elapsed / self.STEPS
        return np.concatenate((self._point, left[:, None]), axis=1).astype(np.float32)

    def move(self, actions: Array) -> tuple[Array, Bools]:
        """Displace the point."""
        self._point += np.clip(actions, -self.REACH, self.REACH)
        return -np.abs(self._point).sum(axis=1), self.elapsed >= self.STEPS


class RecallVectorEnv(KnownAnswerVectorEnv):
    """One of two cues is shown, then nothing for four steps, then the question which it was.

    Seen are three bits: cue 0, cue 1, and whether an answer is asked for. The answer, the sixth action, pays 1 where it
    names the cue, else −1; other actions do nothing.

    The best policy remembers and gets 1. Whoever acts on what it sees alone gets 0, as the random policy does: when the
    question is asked both cues look the same.
    """

    DELAY: Final = 4
    OPTIMAL_RETURN = 1.0
    RANDOM_RETURN = 0.0
    DRAWS = 1
    single_space = MultiBinary(3)
    single_actions = Discrete(2)

    def begin(self, lanes: Lanes, chance: Array) -> None:
        """See `KnownAnswerVectorEnv`."""
        if len(lanes) == self.num_envs:
            self._cue = np.zeros(self.num_envs, dtype=np.int64)
        self._cue[lanes] = (chance[:, 0] >= 0.5).astype(np.int64)

    def observe(self) -> Array:
        """Cue, nothing, or question."""
        bits = np.zeros((self.num_envs, 3), dtype=np.int8)
        first = self.elapsed == 0
        bits[:, 0], bits[:, 1] = first & (self._cue == 0), first & (self._cue == 1)
        bits[:, 2] = self.elapsed == self.DELAY + 1
        return bits

    def move(self, actions: Array) -> tuple[Array, Bools]:
        """Time passes; an answer is judged."""
        over = self.elapsed > self.DELAY + 1
        return np.where(over, np.where(actions == self._cue, 1.0, -1.0), 0.0), over


class BanditEnv(KnownAnswerEnv):
    """One `BanditVectorEnv`."""

    problem: ClassVar = BanditVectorEnv


class ChainEnv(KnownAnswerEnv):
    """One `ChainVectorEnv`."""

    problem: ClassVar = ChainVectorEnv


class GridWorldEnv(KnownAnswerEnv):
    """One `GridWorldVectorEnv`."""

    problem: ClassVar = GridWorldVectorEnv


class CatchEnv(KnownAnswerEnv):
    """One `CatchVectorEnv`."""

    problem: ClassVar = CatchVectorEnv


class TargetEnv(KnownAnswerEnv):
    """One `TargetVectorEnv`."""

    problem: ClassVar = TargetVectorEnv


class RecallEnv(KnownAnswerEnv):
    """One `RecallVectorEnv`."""

    problem: ClassVar = RecallVectorEnv
