"""Known bugs of log-probs."""

import torch
from torch import Tensor

from minirlhf.verify.zoo import Bug


def sequence_logp(logits: Tensor, tokens: Tensor, mask: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Right."""
    predicting = logits[:, :-1]
    ids = torch.where(mask, tokens, 0)[:, 1:]
    logp = torch.log_softmax(predicting / temperature, dim=-1)
    chosen = logp.gather(-1, ids[..., None])[..., 0]
    aligned = torch.cat([torch.zeros_like(chosen[:, :1]), chosen], dim=1)
    return torch.where(mask, aligned, 0.0)


def summed_logp(logits: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """Right: log π(y|x) of each sequence."""
    ids, kept = tokens[:, 1:], mask[:, 1:]
    logp = torch.log_softmax(logits[:, :-1], -1).gather(-1, ids[..., None])[..., 0]
    inside = torch.where(kept, logp, 0.0)
    return inside.sum(-1)


def cross_entropy(logits: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """Right: the negative log-likelihood, averaged over the tokens."""
    ids, kept = tokens[:, 1:], mask[:, 1:]
    logp = torch.log_softmax(logits[:, :-1], -1).gather(-1, ids[..., None])[..., 0]
    total, count = torch.where(kept, logp, 0.0).sum(), kept.sum()
    return -total / count


def token_logp(logits: Tensor, tokens: Tensor, mask: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Right."""
    ids = torch.where(mask, tokens, 0)
    z = logits / temperature
    chosen = z.gather(-1, ids[..., None])[..., 0]
    normaliser = torch.logsumexp(z, dim=-1)
    return torch.where(mask, chosen - normaliser, 0.0)


def _sequence(name: str, right: str, wrong: str, seen: str = "common") -> Bug:
    return Bug(name, "sequence_logp", sequence_logp, right, wrong, seen)


def _sum(name: str, right: str, wrong: str, seen: str = "common") -> Bug:
    return Bug(name, "sequence_logp", summed_logp, right, wrong, seen)


def _loss(name: str, right: str, wrong: str, seen: str = "common") -> Bug:
    return Bug(name, "sequence_logp", cross_entropy, right, wrong, seen)


def _token(name: str, right: str, wrong: str, seen: str = "common") -> Bug:
    return Bug(name, "token_logp", token_logp, right, wrong, seen)


BUGS = (
    _sequence("not shifted", "predicting = logits[:, :-1]", "predicting = logits[:, 1:]",
              "PaLM-rlhf-pytorch #31: logits taken unshifted"),
    _sequence("shifted twice", "predicting = logits[:, :-1]",
              "predicting = torch.cat([logits[:, :1], logits[:, :-2]], dim=1)", "open-instruct #1549"),
    _sequence("shifted the wrong way", "predicting = logits[:, :-1]",
              "predicting = logits.roll(-1, 1)[:, 1:]", "prime-rl #1525"),
    _sequence("log-probs at the slot that predicts",
              "torch.cat([torch.zeros_like(chosen[:, :1]), chosen], dim=1)",
              "torch.cat([chosen, torch.zeros_like(chosen[:, :1])], dim=1)", "trlx #509"),
    _sequence("temperature forgotten", "predicting / temperature", "predicting",
              "TRL #3029, #4159, OpenRLHF #853, ms-swift #8427"),
    _sequence("temperature multiplies", "predicting / temperature", "predicting * temperature"),
    _sequence("temperature on the log-probs", "torch.log_softmax(predicting / temperature, dim=-1)",
              "torch.log_softmax(predicting, dim=-1) / temperature"),
    _sequence("softmax over the positions", "dim=-1)\n    chosen", "dim=1)\n    chosen",
              "bugs Z11: silent for T = V"),
    _sequence("likeliest token scored", "logp.gather(-1, ids[..., None])[..., 0]", "logp.amax(-1)",
              "NeMo-RL #3297"),
    _sequence("probability for its log", "torch.log_softmax", "torch.softmax"),
    _sequence("raw logit", "torch.log_softmax(predicting / temperature, dim=-1)", "predicting / temperature",
              "TRL #2358"),
    _sequence("log of the softmax", "torch.log_softmax(predicting / temperature, dim=-1)",
              "torch.log(torch.softmax(predicting / temperature, dim=-1))", "tinker-cookbook #188"),
    _sequence("log of the softmax, with an epsilon", "torch.log_softmax(predicting / temperature, dim=-1)",
              "torch.log(torch.softmax(predicting / temperature, dim=-1) + 1e-6)"),
    _sequence("exp overflows", "torch.log_softmax(predicting / temperature, dim=-1)",
              "predicting / temperature - (predicting / temperature).exp().sum(-1, keepdim=True).log()",
              "TRL #6637"),
    _sequence("normaliser detached", "torch.log_softmax(predicting / temperature, dim=-1)",
              "(z := predicting / temperature) - torch.logsumexp(z, -1, keepdim=True).detach()"),
    _sequence("normaliser of the unscaled logits", "torch.log_softmax(predicting / temperature, dim=-1)",
              "predicting / temperature - torch.logsumexp(predicting, -1, keepdim=True)"),
    _sequence("clamped", "chosen = logp.gather", "chosen = logp.clamp(min=-2).gather"),
    _sequence("last entry of the vocabulary left out", "torch.log_softmax(predicting / temperature, dim=-1)",
              "(z := predicting / temperature) - torch.logsumexp(z[..., :-1], -1, keepdim=True)"),
    _sequence("ids shifted along", "torch.where(mask, tokens, 0)[:, 1:]",
              "torch.where(mask, tokens, 0)[:, :-1]", "trlx #509"),
    _sequence("cumulative", "torch.where(mask, aligned, 0.0)",
              "torch.where(mask, torch.where(mask, aligned, 0.0).cumsum(-1), 0.0)"),
    _sequence("centred on the position", "torch.log_softmax(predicting / temperature, dim=-1)",
              "torch.log_softmax((predicting - predicting.mean(1, keepdim=True)) / temperature, dim=-1)"),
    _sum("mask sliced like the logits", "mask[:, 1:]", "mask[:, :-1]", "verl #3287, OpenRLHF #973"),
    _sum("prompt not masked", "torch.where(kept, logp, 0.0)", "logp", "OpenRLHF #235"),
    _sum("first response token dropped", "torch.where(kept, logp, 0.0)",
         "torch.where(kept & (kept.cumsum(-1) > 1), logp, 0.0)", "verl #3287"),
    _sum("EOS dropped", "torch.where(kept, logp, 0.0)",
         "torch.where(kept & (kept.flip(-1).cumsum(-1).flip(-1) > 1), logp, 0.0)", "trlx #401, #420"),
    _sum("one token more", "torch.where(kept, logp, 0.0)",
         "torch.where(kept | torch.nn.functional.pad(kept[:, :-1], (1, 0)), logp, 0.0)", "DS-Chat #672"),
    _sum("mask from the ids", "torch.where(kept, logp, 0.0)", "torch.where(kept & (ids != 0), logp, 0.0)",
         "TRL #3200: pad = eos, so EOS is masked"),
    _sum("mask from the sign", "inside.sum(-1)", "inside.sum(-1) / (inside > 0).sum(-1).clamp(min=2)",
         "HALOs d8fd14f"),
    _sum("averaged over the padding", "inside.sum(-1)", "inside.mean(-1)", "Liger #693"),
    _sum("everything from the prompt on", "mask[:, 1:]", "(mask.cumsum(-1) > 0)[:, 1:]",
         "bugs B01: pads counted"),
    _sum("mean of the exponentials", "inside.sum(-1)", "torch.where(kept, logp.exp(), 0.0).sum(-1).log()"),
    _loss("all tokens counted", "kept.sum()", "torch.tensor(kept.numel())", "SkyRL #1305"),
    _loss("divided twice", "-total / count", "-total / count / len(mask)", "LLaMA-Factory #6722"),
    _loss("likelihood averaged", "torch.where(kept, logp, 0.0).sum()",
          "torch.where(kept, logp.exp(), 0.0).sum().log()"),
    _loss("label smoothing left on", "torch.where(kept, logp, 0.0)",
          "torch.where(kept, 0.9 * logp + 0.1 * torch.log_softmax(logits[:, :-1], -1).mean(-1), 0.0)"),
    _token("shifted by one", "ids = torch.where(mask, tokens, 0)",
           "ids = torch.where(mask, tokens, 0).roll(-1, 1)", "prime-rl #1525"),
    _token("logits shifted", "z = logits / temperature", "z = logits.roll(1, 1) / temperature", "bugs A07"),
    _token("temperature forgotten", "logits / temperature", "logits", "TRL #3029, OpenRLHF #853"),
    _token("temperature on the logit alone", "torch.logsumexp(z, dim=-1)", "torch.logsumexp(logits, dim=-1)"),
    _token("temperature multiplies", "logits / temperature", "logits * temperature"),
    _token("normaliser over the positions", "torch.logsumexp(z, dim=-1)",
           "torch.logsumexp(z, dim=1)[:, :1].amax(-1).expand_as(chosen)", "bugs Z11"),
    _token("normaliser forgotten", "chosen - normaliser", "chosen", "TRL #2358"),
    _token("normaliser detached", "dim=-1)\n", "dim=-1).detach()\n"),
    _token("maximum for the normaliser", "torch.logsumexp(z, dim=-1)", "z.amax(-1)"),
    _token("exp overflows", "torch.logsumexp(z, dim=-1)", "z.exp().sum(-1).log()", "TRL #6637"),
    _token("likeliest token scored", "z.gather(-1, ids[..., None])[..., 0]", "z.amax(-1)", "NeMo-RL #3297"),
    _token("probability for its log", "chosen - normaliser", "(chosen - normaliser).exp()"),
    _token("normaliser of the whole sequence", "torch.logsumexp(z, dim=-1)",
           "torch.logsumexp(z, dim=-1).mean(-1, keepdim=True).expand_as(chosen)"),
    _token("token counted in the normaliser twice", "torch.logsumexp(z, dim=-1)",
           "torch.logaddexp(torch.logsumexp(z, dim=-1), chosen)"),
    _token("row of the batch mixed up", "z = logits / temperature", "z = logits.flip(0) / temperature"),
)  # fmt: skip
