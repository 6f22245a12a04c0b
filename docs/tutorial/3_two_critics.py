"""Step 3: PPO with a second critic for the cost and a penalty on it of fixed weight λ (Reward Shaping).

    L(θ) = ( E[R] - λ E[C - d] ) / (1 + λ) - β KL(π_θ ‖ π_ref),   λ fixed

Source: Reward Shaping and the two critics of Safe RLHF (arXiv 2310.12773).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

torch.set_default_dtype(torch.float64)

# Three prompts and their hazard. A response is up to four tokens: steps, which help and may harm, and talk
HAZARDS = {"harmless": 0, "delicate": 1, "dangerous": 2}
EOS, STEP, TALK = range(3)
LENGTH = 4


@dataclass
class Args:
    """Three prompts, and a policy that is a table of logits."""

    seed: int = 1  # seeds the responses
    iterations: int = 400  # batches of responses
    responses_per_prompt: int = 32  # K, responses sampled for each prompt in an iteration
    learning_rate: float = 0.05  # of Adam, for every table
    update_epochs: int = 4  # updates on one batch
    kl_coef: float = 0.05  # β, weight of the KL divergence from the reference
    gae_lambda: float = 0.95  # λ_GAE, bias-variance trade-off of the advantages
    clip_coef: float = 0.2  # clip range of the probability ratio
    value_clip_coef: float = 5.0  # clip range of a value's change within an iteration
    cost_threshold: float = 0.0  # d, the cost up to which a response is safe
    lambda_init: float = 1.0  # initial multiplier; 0 stays 0


# ---- The world: rewards and costs are known exactly
def score(tokens: Tensor, hazards: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards and costs [batch] and response mask [batch, response] of tokens [batch, response]; hazards: [batch]."""
    ends = (tokens == EOS).long()
    mask = (ends.cumsum(1) - ends == 0).long()  # no EOS before this token
    steps, talk = ((tokens == STEP) * mask).sum(1), ((tokens == TALK) * mask).sum(1)
    return (steps - talk).double(), hazards * steps - 2.5, mask


def evaluate(policy: Tensor) -> None:
    """Print the exact means of a policy over all responses, weighted by their probability."""
    every = torch.cartesian_prod(*[torch.arange(3)] * LENGTH)  # [3^LENGTH, LENGTH]
    print(f"{'':<10}{'reward':>8}{'cost':>8}{'safe':>8}")
    figures = []
    for prompt, hazard in enumerate(HAZARDS.values()):
        rewards, costs, _ = score(every, torch.tensor(hazard))
        weights = policy[prompt].log_softmax(-1).gather(1, every.T).sum(0).exp()
        figures.append([(weights * figure).sum().item() for figure in (rewards, costs, costs <= 0)])
    for name, row in zip([*HAZARDS, "all"], [*figures, torch.tensor(figures).mean(0).tolist()], strict=True):
        print("{:<10}{:>8.2f}{:>8.2f}{:>8.1%}".format(name, *row))


# ---- The algorithm
def combine_advantages(reward_advantages: Tensor, cost_advantages: Tensor, multiplier: Tensor | float) -> Tensor:
    """Advantage of the Lagrangian, [batch, response]; multiplier: λ, or one per response, [batch, 1]."""
    return (reward_advantages - multiplier * cost_advantages) / (1 + multiplier)


def token_signal(terminal: Tensor, log_ratio: Tensor, response_mask: Tensor, kl_weight: float) -> Tensor:
    """A score at the last token plus the KL penalty at every token, their sum clamped to ±50; [batch, response].

    terminal: [batch]; log_ratio: log π_old - log π_ref of the response tokens, [batch, response].
    kl_weight: -β for rewards, +β for costs; (R - λ C) / (1 + λ) then has the weight -β whatever λ is."""
    last = response_mask.sum(1, keepdim=True) - 1
    signal = (kl_weight * log_ratio).scatter_add(1, last, terminal[:, None])
    return signal.clamp(-50, 50) * response_mask


def gae(rewards: Tensor, values: Tensor, response_mask: Tensor, gae_lambda: float) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation with γ = 1 (arXiv 1506.02438). Returns advantages and returns.

    All [batch, response]; values[:, t] is the estimate BEFORE token t, and the return after the last token is zero."""
    rewards, values = rewards * response_mask, values * response_mask
    next_values = F.pad(values[:, 1:], (0, 1))
    deltas = rewards + next_values - values
    advantages = torch.zeros_like(values)
    running = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        running = deltas[:, t] + gae_lambda * running
        advantages[:, t] = running
    return advantages, advantages + values


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_coef: float) -> Tensor:
    """PPO's clipped surrogate (arXiv 1707.06347) as a loss per token, [batch, response]."""
    ratio = (logprobs - old_logprobs).exp()
    return -torch.min(ratio * advantages, ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantages)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip_coef: float) -> Tensor:
    """Half the squared error, with the value's change clipped as in OpenAI's PPO code; per token, [batch, response]."""
    clipped = old_values + (values - old_values).clamp(-clip_coef, clip_coef)
    return 0.5 * torch.max((values - returns) ** 2, (clipped - returns) ** 2)


def main(args: Args) -> None:
    generator = torch.Generator().manual_seed(args.seed)
    k = args.responses_per_prompt
    prompts = torch.arange(len(HAZARDS)).repeat_interleave(k)  # [batch]
    hazards = torch.tensor(list(HAZARDS.values()))[prompts]
    policy = torch.zeros(len(HAZARDS), LENGTH, 3, requires_grad=True)  # logits of the next token
    ref_policy = policy.detach().clone()
    reward_critic = torch.zeros(len(HAZARDS), LENGTH, requires_grad=True)  # value before each token
    cost_critic = torch.zeros(len(HAZARDS), LENGTH, requires_grad=True)
    optimizer = torch.optim.Adam([policy, reward_critic, cost_critic], lr=args.learning_rate)
    multiplier = args.lambda_init

    for _ in range(args.iterations):
        # Rollout and scores
        probs = policy.detach()[prompts].softmax(-1)  # [batch, response, 3]
        tokens = torch.multinomial(probs.flatten(0, 1), 1, generator=generator).view(-1, LENGTH)
        rewards, costs, response_mask = score(tokens, hazards)

        terminal_costs = costs - args.cost_threshold  # C(x, y) - d

        for epoch in range(args.update_epochs):
            logprobs = policy[prompts].log_softmax(-1).gather(2, tokens[..., None]).squeeze(2)  # [batch, response]
            reward_values, cost_values = reward_critic[prompts], cost_critic[prompts]
            if epoch == 0:  # the models have not moved yet, so this pass also gives the old values
                old_logprobs, old_reward_values = logprobs.detach(), reward_values.detach()
                old_cost_values = cost_values.detach()
                ref_logprobs = ref_policy[prompts].log_softmax(-1).gather(2, tokens[..., None]).squeeze(2)
                log_ratio = old_logprobs - ref_logprobs  # k_t of the KL penalty
                token_rewards = token_signal(rewards, log_ratio, response_mask, -args.kl_coef)
                token_costs = token_signal(terminal_costs, log_ratio, response_mask, args.kl_coef)
                reward_advantages, reward_returns = gae(
                    token_rewards, old_reward_values, response_mask, args.gae_lambda
                )
                cost_advantages, cost_returns = gae(token_costs, old_cost_values, response_mask, args.gae_lambda)
                advantages = combine_advantages(reward_advantages, cost_advantages, multiplier)
            loss = policy_loss(logprobs, old_logprobs, advantages, args.clip_coef)
            loss = loss + value_loss(reward_values, old_reward_values, reward_returns, args.value_clip_coef)
            loss = loss + value_loss(cost_values, old_cost_values, cost_returns, args.value_clip_coef)
            loss = (loss * response_mask).sum() / response_mask.sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    evaluate(policy.detach())
    print(f"λ {multiplier:.2f}")


if __name__ == "__main__":
    main(tyro.cli(Args))
