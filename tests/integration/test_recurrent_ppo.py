"""RecurrentPPO of sb3-contrib: episodes begin inside its sequences, which it runs as a Python loop
over timesteps; here one call with `resets`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import torch
from sb3_contrib import RecurrentPPO
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.torch_layers import FlattenExtractor
from torch import Tensor, nn

import rnn_fused
from rnn_fused.bench.timer import Settings, interleave

ENVIRONMENTS = 8


class PositionsOnly(gymnasium.ObservationWrapper):
    """CartPole without its velocities: they have to be remembered."""

    def __init__(self, env: gymnasium.Env) -> None:
        super().__init__(env)
        space = env.observation_space
        self.observation_space = gymnasium.spaces.Box(space.low[::2], space.high[::2])

    def observation(self, observation: np.ndarray) -> np.ndarray:
        return observation[::2]


class FusedPolicy(RecurrentActorCriticPolicy):
    """The policy with our layers, and one call instead of the loop."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        rnn_fused.convert(self)
        assert type(self.lstm_actor) is type(self.lstm_critic) is rnn_fused.LSTM

    @staticmethod
    def _process_sequence(
        features: Tensor,
        lstm_states: tuple[Tensor, Tensor],
        episode_starts: Tensor,
        lstm: nn.Module,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        B = lstm_states[0].shape[1]
        sequences = features.reshape(B, -1, lstm.input_size).transpose(0, 1)
        resets = episode_starts.reshape(B, -1).transpose(0, 1).bool()
        output, state = lstm(sequences, lstm_states, resets=resets)
        return output.transpose(0, 1).flatten(0, 1), state


class DoubleExtractor(FlattenExtractor):
    def forward(self, observations: Tensor) -> Tensor:
        return super().forward(observations).double()


def agent(policy: str | type[FusedPolicy], **policy_options: Any) -> RecurrentPPO:
    env = make_vec_env(
        "CartPole-v1", ENVIRONMENTS, seed=1, wrapper_class=lambda env: PositionsOnly(env)
    )
    return RecurrentPPO(
        policy,
        env,
        n_steps=128,
        batch_size=128,
        n_epochs=10,
        learning_rate=1e-3,
        gae_lambda=0.98,
        max_grad_norm=1.0,
        seed=1,
        device="cpu",
        policy_kwargs={
            "net_arch": {"pi": [], "vf": [64]},
            "lstm_hidden_size": 64,
            "ortho_init": False,
            **policy_options,
        },
    )


def loss_of(policy: RecurrentActorCriticPolicy, batch: Any) -> dict[str, Tensor]:
    """PPO's terms on one batch of a rollout, before it is clipped."""
    states, starts = batch.lstm_states, batch.episode_starts
    actions = batch.actions.long().flatten()
    values, log_prob, entropy = policy.evaluate_actions(batch.observations, actions, states, starts)
    ratio = torch.exp(log_prob - batch.old_log_prob)
    mask = batch.mask > 0
    policy_loss = -(batch.advantages * ratio)[mask].mean()
    value_loss = (batch.returns - values.flatten())[mask].square().mean()
    loss = policy_loss + 0.5 * value_loss - 0.01 * entropy[mask].mean()
    return {"loss": loss, "values": values, "log_prob": log_prob, "entropy": entropy}


def gradients(policy: RecurrentActorCriticPolicy, batch: Any) -> dict[str, Tensor]:
    names, parameters = zip(*policy.named_parameters(), strict=True)
    found = torch.autograd.grad(loss_of(policy, batch)["loss"], parameters, allow_unused=True)
    return {n: g for n, g in zip(names, found, strict=True) if g is not None}


def in_float64(batch: Any) -> Any:
    """States, and what the loss takes, in the policy's precision."""
    states = type(batch.lstm_states)(*(tuple(s.double() for s in p) for p in batch.lstm_states))
    return batch._replace(lstm_states=states)


def rollout(model: RecurrentPPO) -> Any:
    torch.manual_seed(1)  # actions are drawn from the global generator
    _, callback = model._setup_learn(total_timesteps=1)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    return model.rollout_buffer


def test_the_same_rollout_and_losses() -> None:
    """Actions of a whole rollout in float32; losses and gradients on it in float64."""
    models = {"loop": agent("MlpLstmPolicy"), "resets": agent(FusedPolicy)}
    theirs, ours = map(rollout, models.values())
    assert theirs.episode_starts[1:].sum() > ENVIRONMENTS  # episodes did end inside the rollout
    np.testing.assert_array_equal(ours.actions, theirs.actions)
    np.testing.assert_array_equal(ours.observations, theirs.observations)
    np.testing.assert_allclose(ours.values, theirs.values, rtol=1e-5, atol=1e-6)

    policies = {name: model.policy.double() for name, model in models.items()}
    for policy in policies.values():
        policy.features_extractor = DoubleExtractor(policy.observation_space)
    np.random.seed(0)  # noqa: NPY002 the buffer shuffles by it
    for batch in map(in_float64, theirs.get(256)):
        expected = loss_of(policies["loop"], batch), gradients(policies["loop"], batch)
        actual = loss_of(policies["resets"], batch), gradients(policies["resets"], batch)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def test_it_learns() -> None:
    """A random policy balances the pole for some 20 steps."""
    model = agent(FusedPolicy)
    model.learn(25_000)
    reward, _ = evaluate_policy(model, model.get_env(), n_eval_episodes=16)
    print(f"reward {reward:.0f}")
    assert reward > 100


def test_an_update_takes_less_time() -> None:
    """A batch of a rollout, forward and backward, in turns with the library's loop."""
    model = agent("MlpLstmPolicy")
    fused = agent(FusedPolicy).policy
    fused.load_state_dict(model.policy.state_dict())
    batch = next(iter(rollout(model).get(256)))

    def update(policy: RecurrentActorCriticPolicy) -> Callable[[], None]:
        return lambda: gradients(policy, batch) and None

    times = interleave({"loop": update(model.policy), "resets": update(fused)}, Settings(1.0))
    ratio = times["resets"].speedup_over(times["loop"])
    print(f"the loop takes {ratio:.1f} times as long, {times['loop'].median * 1e3:.1f} ms")
    assert ratio > 1
