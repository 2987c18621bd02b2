"""Any Gymnasium id as a world.

Lanes are one NumPy computation where the id has such a form that serves (`vectorised`), else one environment a lane:

| the id's vector entry point | lanes |
|---|---|
| Gymnasium's `CartPoleVectorEnv` | `CartPoles` |
| a `KnownAnswerVectorEnv` | it, without autoreset |
| another whose `metadata` declares `SAME_STEP` | it, as it is |
| none, another, or wrappers in the id's registration | `PlainEnvs` |

A class that resets ended lanes in the next step (`NEXT_STEP`, most of them) is not used: that step swallows an action,
and would be a step of experience that no policy made.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import metadata
from typing import Any, Final

import gymnasium
import msgspec
import numpy.typing as npt
from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv
from gymnasium.envs.registration import EnvSpec, load_env_creator
from gymnasium.vector import AutoresetMode, VectorEnv

from esper_simic.errors import ConfigError
from esper_simic.specs import Choices, VectorSpec
from esper_simic.worlds.cart_poles import CartPoles
from esper_simic.worlds.known_answer import KnownAnswerVectorEnv
from esper_simic.worlds.lanes import GymnasiumLanes
from esper_simic.worlds.outcome import Outcome
from esper_simic.worlds.plain import PlainEnvs
from esper_simic.worlds.scripts import RandomScript
from esper_simic.worlds.spaces import ActionForm, ObservationForm

Array = npt.NDArray[Any]

REFUSALS: Final = (
    gymnasium.error.Error,
    ImportError,
    TypeError,
    ValueError,
    KeyError,
    AttributeError,
    AssertionError,
    OSError,
)
"""What environments are known to raise at what they cannot be made with."""

NO_LIMIT: Final = -1
"""`max_episode_steps` by which Gymnasium is told to cut no episode."""

DISTRIBUTIONS: Final = {"esper_simic": "simic"}
"""Distributions that are named otherwise than their package."""


class GymnasiumWorld:
    """The environments of one Gymnasium id.

    Args:
        id: As `gymnasium.make` takes it; `module:name` imports the module that registers it first.
        kwargs: Keywords it is made with.
        vectorised: Use a form that is one computation, where there is one that serves.
        success_return: An episode with this return or more is a success; None: the id's own `reward_threshold`.

    Attributes:
        spec: Vectors of numbers, and what an action is.
        reward_threshold: Return from which the id counts as solved; None where it does not say.

    Raises:
        ConfigError: There is no such id here, it cannot be made, or its spaces are not ones a policy can be made for.
    """

    def __init__(
        self,
        id: str,  # noqa: A002 - Gymnasium's word for it
        kwargs: Mapping[str, Any] | None = None,
        *,
        vectorised: bool = True,
        success_return: float | None = None,
    ) -> None:
        self._id, self._kwargs = id, dict(kwargs or {})
        self._registered = find_spec(id)
        self._native = _native(self._registered, self._kwargs) if vectorised else None
        self.reward_threshold = self._registered.reward_threshold
        self._success_return = self.reward_threshold if success_return is None else success_return
        probe = self._checked_env(1)
        self._forms = (
            ObservationForm(probe.single_observation_space, id),
            ActionForm(probe.single_action_space, id),
        )
        probe.close()
        observation, action = self._forms
        if observation.mask_size and probe.metadata.get("autoreset_mode") == AutoresetMode.SAME_STEP:
            self._native = (
                None  # last observations of ended lanes come one by one, not as a batch of the space
            )
        masks = observation.mask_size
        if masks and (not isinstance(action.spec, Choices) or sum(action.spec.sizes) != masks):
            raise ConfigError(
                f"{id} has an action mask of {masks} entries, and its actions are {action.spec}: a mask has one entry "
                f"for each choice",
                "environment.id",
            )
        self.spec = VectorSpec(observation.features, action.spec, masked=masks > 0)

    @property
    def horizon(self) -> int | None:
        """Steps after which Gymnasium cuts an episode; None where it does not."""
        steps = self._kwargs.get("max_episode_steps", self._registered.max_episode_steps)
        return None if steps in (None, NO_LIMIT) else int(steps)

    def lanes(
        self, lane_seeds: Sequence[int], first_episodes: Sequence[int], *, stagger: bool
    ) -> GymnasiumLanes:
        """Fresh lanes; see `worlds.lanes` for what each depends on."""
        return self._lanes(self._make(len(lane_seeds)), lane_seeds, first_episodes, stagger=stagger)

    def _lanes(
        self,
        envs: VectorEnv[Array, Array, Array],
        lane_seeds: Sequence[int],
        first_episodes: Sequence[int],
        *,
        stagger: bool,
    ) -> GymnasiumLanes:
        return GymnasiumLanes(
            envs,
            self._id,
            self._forms,
            lane_seeds=lane_seeds,
            first_episodes=first_episodes,
            horizon=self.horizon if stagger else None,
            success_return=self._success_return,
        )

    def script(self, name: str, lanes: object) -> RandomScript:
        """See `World.script`; in such worlds there is one."""
        return RandomScript(self.spec.action)

    def digest(self) -> str:
        """Begin an episode, so that what is wrong shows now; SHA-256 of what the environments are.

        That is id, entry point and version of its package, the version of Gymnasium, keywords, and time limit. Whether
        lanes are vectorised is no part of it: episodes are the same.

        Raises:
            ConfigError: They cannot be reset.
        """
        envs = self._make(1)
        lanes = self._lanes(envs, [0], [0], stagger=False)
        try:
            lanes.reset()
        except REFUSALS as error:
            raise _refused(self._id, "reset", error) from error
        finally:
            lanes.close()
        entry = self._registered.entry_point or self._registered.vector_entry_point
        place = (
            entry if isinstance(entry, str) else f"{entry.__module__}:{getattr(entry, '__qualname__', '')}"
        )
        identity = {
            "id": self._registered.id,
            "entry_point": place,
            "version": _version_of(place.partition(":")[0].partition(".")[0]),
            "gymnasium": gymnasium.__version__,
            "registered": self._registered.kwargs,
            "kwargs": self._kwargs,
            "horizon": self.horizon,
        }
        data: str = getattr(envs, "data_digest", "")
        if data:
            identity["data"] = data
        return hashlib.sha256(msgspec.json.encode(identity, enc_hook=repr, order="deterministic")).hexdigest()

    def outcome(self, episode: Mapping[str, Array], lane: int) -> Outcome:
        """See `World.outcome`; such worlds measure nothing but return and length."""
        return Outcome(
            episode_return=float(episode["r"][lane]),
            length=int(episode["l"][lane]),
            success=bool(episode["success"][lane]),
            measures={},
        )

    def _checked_env(self, lanes: int) -> VectorEnv[Array, Array, Array]:
        try:
            return self._make(lanes)
        except REFUSALS as error:
            raise _refused(
                self._id, f"made with {self._kwargs}" if self._kwargs else "made", error
            ) from error

    def _make(self, lanes: int) -> VectorEnv[Array, Array, Array]:
        if self._native is None:
            return PlainEnvs(
                lambda: gymnasium.make(self._registered, disable_env_checker=True, **self._kwargs), lanes
            )
        settings = {**self._registered.kwargs, **self._kwargs}
        if self.horizon is not None:
            settings["max_episode_steps"] = self.horizon
        return self._native(num_envs=lanes, **settings)


def find_spec(id: str) -> EnvSpec:  # noqa: A002 - Gymnasium's word for it
    """What is registered under an id.

    Raises:
        ConfigError: Nothing, with the nearest ids; or the module in front of it cannot be imported.
    """
    module, _, name = id.rpartition(":")
    try:
        if module:
            importlib.import_module(module)
        return gymnasium.spec(name)
    except ImportError as error:
        raise ConfigError(
            f"module {module!r}, which registers {name}, cannot be imported: {error}", "environment.id"
        ) from error
    except gymnasium.error.Error as error:
        hint = (
            "" if module else f" An id that a package registers stands behind its name: package.module:{name}"
        )
        raise ConfigError(f"{error}{hint}", "environment.id") from None


def _native(registered: EnvSpec, kwargs: Mapping[str, Any]) -> Callable[..., VectorEnv[Any, Any, Any]] | None:
    """Makes what serves as lanes of an id, one computation for all; None where there is nothing."""
    entry = registered.vector_entry_point
    # Wrappers are of single environments; and what -1 means to a vectorised one is not said anywhere.
    unlimited = kwargs.get("max_episode_steps") == NO_LIMIT
    if entry is None or registered.additional_wrappers or unlimited:
        return None
    try:
        found: object = load_env_creator(entry) if isinstance(entry, str) else entry
    except (ImportError, AttributeError):
        return None  # such as a form that needs JAX; the plain one may do without
    if found is CartPoleVectorEnv:
        return CartPoles
    if not isinstance(found, type) or not issubclass(found, VectorEnv):
        return None
    if issubclass(found, KnownAnswerVectorEnv):
        return partial(found, autoreset_mode=AutoresetMode.DISABLED)
    return found if found.metadata.get("autoreset_mode") == AutoresetMode.SAME_STEP else None


def _refused(id: str, what: str, error: Exception) -> ConfigError:  # noqa: A002
    said = str(error) or type(error).__name__
    return ConfigError(f"{id} cannot be {what}: {said}", "environment")


def _version_of(package: str) -> str:
    """Version of the distribution that is named as its package is; empty where none is."""
    try:
        return metadata.version(DISTRIBUTIONS.get(package, package))
    except metadata.PackageNotFoundError:
        return ""
