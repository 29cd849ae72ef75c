"""Balance a pole without seeing how fast it moves: PPO with a policy that remembers.

CartPole-v1 of gymnasium, of which only the position of the cart and the angle of the pole are
observed. Velocities have to be inferred from what was seen before, by a GRU. To act, it takes one
timestep at a time (`step`). To learn, it takes whole rollouts of T timesteps in N environments in
one call, from the state in which the rollout began; episodes end inside them, and `resets` says
where. Both give the same state at the same timestep.

Baselines: random actions; the same network with the same training, but whose state is reset before
every timestep, which makes it a feed-forward policy; and this feed-forward policy when it sees two
observations, the latest and how much it has changed since the one before.

    python examples/recurrent_policy.py
    python examples/recurrent_policy.py --quick   # 8 iterations of one run

The full form trains each of them with three seeds and takes 92 s on one core of a Zen 4. Episodes
end after 500 timesteps at the latest. The mean return of 100, with three and with five seeds:

    recurrent         495.1 to 497.6    461.0 to 497.6
    without memory     48.8 to  50.1     43.4 to  50.1
    two observations       500.0             500.0
    random             21.5 to  23.2     21.5 to  23.2

Here two observations are enough, and better. What the recurrent policy spares is to know how far
back one has to look.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import gymnasium
import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Categorical

import rnn_fused

T, N = 128, 32  # timesteps of a rollout, environments
EPOCHS, MINIBATCHES = 6, 4
DISCOUNT, TRACE, CLIP = 0.99, 0.95, 0.2  # gamma, lambda of GAE, epsilon of PPO


class Policy(nn.Module):
    """Probabilities of the two actions, and the value, after each observation.

    Without memory the state is reset before every timestep. The input size is 2, or 4 to see
    changes too (`Poles`).
    """

    def __init__(self, memory: bool, input_size: int = 2, hidden_size: int = 64) -> None:
        super().__init__()
        self.memory, self.input_size = memory, input_size
        self.encoder = nn.Sequential(nn.Linear(input_size, hidden_size), nn.Tanh())
        self.rnn = rnn_fused.GRU(hidden_size, hidden_size)
        self.head = nn.Linear(hidden_size, 3)
        nn.init.orthogonal_(self.head.weight, 0.1)  # begins near even odds

    def forward(self, x: Tensor, state: Tensor, resets: Tensor) -> tuple[Categorical, Tensor]:
        """Observations x [T, N, I], resets [T, N] and the state [1, N, H] before them."""
        resets = resets | (not self.memory)
        x, _ = self.rnn(self.encoder(x), state, resets=resets)
        return self.read(x)

    def step(
        self, x: Tensor, state: Tensor | None, resets: Tensor
    ) -> tuple[Categorical, Tensor, Tensor]:
        """One timestep: x [N, I], resets [N]; also returns the state after it."""
        resets = resets | (not self.memory)
        x, state = self.rnn.step(self.encoder(x), state, resets=resets)
        return *self.read(x), state

    def read(self, x: Tensor) -> tuple[Categorical, Tensor]:
        logits, value = self.head(x).split((2, 1), dim=-1)
        return Categorical(logits=logits), value.squeeze(-1)


class Poles:
    """`n` environments: what is observed now, and which of them have just begun or ended.

    An observation [n, I] is of I = 2 numbers, or of I = 4 with how much each has changed since the
    observation before; zero at the beginning of an episode.

    One that has ended shows its last observation, whose value counts if the pole did not fall but
    the episode was cut off, at 500 timesteps. It ignores the next action and begins anew.
    """

    def __init__(self, n: int, seed: int, input_size: int = 2) -> None:
        self.envs = gymnasium.make_vec("CartPole-v1", n, vectorization_mode="vector_entry_point")
        self.begun = torch.ones(n, dtype=torch.bool)
        self.ended = torch.zeros(n, dtype=torch.bool)
        self.observation = torch.zeros(n, input_size)
        self.observe(self.envs.reset(seed=seed)[0])

    def step(self, action: Tensor) -> tuple[Tensor, Tensor]:
        """Rewards [n], and which poles fell."""
        everything, reward, fell, cut_off, _ = self.envs.step(action.numpy())
        self.begun, self.ended = self.ended, torch.from_numpy(fell | cut_off)
        self.observe(everything)
        return torch.from_numpy(reward), torch.from_numpy(fell)

    def observe(self, everything: np.ndarray) -> None:
        position, _, angle, _ = torch.from_numpy(everything).unbind(1)
        now = torch.stack((position, 10 * angle), 1)
        # Ten times, to be of the size of the other two.
        change = 10 * (now - self.observation[:, :2]) * ~self.begun.unsqueeze(1)
        self.observation = torch.cat((now, change), 1)[:, : self.observation.shape[1]]


class Rollout(NamedTuple):
    """What the environments and the policy did, [T, N] each."""

    observation: Tensor  # [T, N, I]
    begun: Tensor
    ended: Tensor
    action: Tensor
    log_prob: Tensor
    value: Tensor
    reward: Tensor
    fell: Tensor


@torch.no_grad()
def play(policy: Policy, poles: Poles, state: Tensor) -> tuple[Rollout, Tensor, Tensor]:
    """T timesteps, the advantage of each action [T, N] (Schulman et al. 2016,
    https://arxiv.org/abs/1506.02438), and the state after them."""
    steps = []
    for _ in range(T):
        seen = poles.observation, poles.begun, poles.ended
        odds, value, state = policy.step(poles.observation, state, poles.begun)
        action = odds.sample()
        steps.append((*seen, action, odds.log_prob(action), value, *poles.step(action)))
    rollout = Rollout(*map(torch.stack, zip(*steps, strict=True)))

    _, next_value, _ = policy.step(poles.observation, state, poles.begun)
    next_ended = poles.ended
    advantages = torch.zeros(T + 1, N)
    for t in reversed(range(T)):
        # A tenth of the reward keeps values, and so the gradients of their errors, near 1.
        target = 0.1 * rollout.reward[t] + DISCOUNT * next_value * ~rollout.fell[t]
        advantages[t] = target - rollout.value[t]
        advantages[t] += DISCOUNT * TRACE * advantages[t + 1] * ~next_ended
        next_value, next_ended = rollout.value[t], rollout.ended[t]
    return rollout, advantages[:-1], state


def train(iterations: int, seed: int, memory: bool, input_size: int = 2) -> Policy:
    """PPO (Schulman et al. 2017, https://arxiv.org/abs/1707.06347)."""
    torch.manual_seed(seed)
    policy, poles = Policy(memory, input_size), Poles(N, seed, input_size)
    optimizer = torch.optim.Adam(policy.parameters(), lr=2.5e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, iterations)
    state = torch.zeros(1, N, policy.rnn.hidden_size)
    for _ in range(iterations):
        initial = state
        rollout, advantages, state = play(policy, poles, initial)
        returns = advantages + rollout.value
        counts = ~rollout.ended  # the other actions were ignored
        advantages = (advantages - advantages[counts].mean()) / advantages[counts].std()
        for _ in range(EPOCHS):
            for some in torch.randperm(N).chunk(MINIBATCHES):
                old, advantage = Rollout(*(x[:, some] for x in rollout)), advantages[:, some]
                odds, value = policy(old.observation, initial[:, some], old.begun)
                ratio = (odds.log_prob(old.action) - old.log_prob).exp()
                gain = torch.min(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)
                loss = 0.5 * (value - returns[:, some]).square() - gain
                optimizer.zero_grad()
                loss[counts[:, some]].mean().backward()
                nn.utils.clip_grad_norm_(policy.parameters(), 0.5)
                optimizer.step()
        schedule.step()
    return policy


@torch.no_grad()
def evaluate(policy: Policy | None, seed: int, episodes: int = 100) -> float:
    """Mean return of one episode in each of `episodes` environments; random actions for None."""
    torch.manual_seed(seed)
    poles = Poles(episodes, seed, policy.input_size if policy else 2)
    running, state, total = ~poles.ended, None, 0.0
    while running.any():
        odds = Categorical(torch.ones(episodes, 2))
        if policy:
            odds, _, state = policy.step(poles.observation, state, poles.begun)
        total += poles.step(odds.sample())[0][running].sum().item()
        running &= ~poles.ended
    return total / episodes


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="8 iterations of one run")
    parser.add_argument("--iterations", type=int, default=40, help=f"of {T * N} timesteps")
    parser.add_argument("--runs", type=int, default=3, help="each with a seed of its own")
    parser.add_argument("--seed", type=int, default=0, help="the first run's")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the network is small: threads would wait for each other
    iterations, runs = (8, 1) if options.quick else (options.iterations, options.runs)

    total: dict[str, float] = defaultdict(float)
    for seed in range(options.seed, options.seed + runs):
        policies = {
            "recurrent": train(iterations, seed, memory=True),
            "without memory": train(iterations, seed, memory=False),
            "two observations": train(iterations, seed, memory=False, input_size=4),
            "random": None,
        }
        for name, policy in policies.items():
            mean_return = evaluate(policy, seed + 1000)
            total[name] += mean_return
            print(f"run {seed}, {name}: mean return of 100 episodes {mean_return:.1f}")
    return {name: sum_of_runs / runs for name, sum_of_runs in total.items()}


if __name__ == "__main__":
    main()
