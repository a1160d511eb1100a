"""The commands as a user sees them."""

from minirlhf.commands.common import Command
from minirlhf.commands.influence import Influence
from minirlhf.commands.judging import Evaluate
from minirlhf.commands.models import Import, Model
from minirlhf.commands.on_policy import PPO, Group, Pairs
from minirlhf.commands.stages import DPO, IPO, SFT, Pretrain, Reward
from minirlhf.commands.whole import Run, World
from minirlhf.verify.command import Verify

__all__ = ["COMMANDS", "Command"]

COMMANDS: dict[str, type[Command]] = {
    "run": Run,
    "world": World,
    "model": Model,
    "import": Import,
    "pretrain": Pretrain,
    "sft": SFT,
    "reward": Reward,
    "ppo": PPO,
    "group": Group,
    "pairs": Pairs,
    "dpo": DPO,
    "ipo": IPO,
    "evaluate": Evaluate,
    "influence": Influence,
    "verify": Verify,
}
