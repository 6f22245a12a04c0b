"""Step 1: the policy gradient.

    J(θ) = E_x E_y [R(x, y)],   ∇J = E_x E_y [ Σ_t ∇log π_θ(y_t) · (R(x, y) - b) ],   b the mean reward of the batch

Source: REINFORCE (Williams, Machine Learning 8, 1992).
"""

from dataclasses import dataclass

import torch
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
def policy_loss(logprobs: Tensor, advantages: Tensor) -> Tensor:
    """The policy gradient (REINFORCE) as a loss per token, [batch, response]: its gradient is -A ∇log π."""
    return -logprobs * advantages


def main(args: Args) -> None:
    generator = torch.Generator().manual_seed(args.seed)
    k = args.responses_per_prompt
    prompts = torch.arange(len(HAZARDS)).repeat_interleave(k)  # [batch]
    hazards = torch.tensor(list(HAZARDS.values()))[prompts]
    policy = torch.zeros(len(HAZARDS), LENGTH, 3, requires_grad=True)  # logits of the next token
    optimizer = torch.optim.Adam([policy], lr=args.learning_rate)

    for _ in range(args.iterations):
        # Rollout and scores
        probs = policy.detach()[prompts].softmax(-1)  # [batch, response, 3]
        tokens = torch.multinomial(probs.flatten(0, 1), 1, generator=generator).view(-1, LENGTH)
        rewards, _, response_mask = score(tokens, hazards)

        # One step along the policy gradient
        advantages = (rewards - rewards.mean())[:, None]  # [batch, 1]: the same for every token of a response
        logprobs = policy[prompts].log_softmax(-1).gather(2, tokens[..., None]).squeeze(2)  # [batch, response]
        loss = (policy_loss(logprobs, advantages) * response_mask).sum() / response_mask.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    evaluate(policy.detach())


if __name__ == "__main__":
    main(tyro.cli(Args))
