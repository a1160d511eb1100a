"""The command that compares policies."""

from dataclasses import dataclass, field
from pathlib import Path

from minirlhf.commands.common import Device, Flat
from minirlhf.evaluation.compare import EvaluationConfig
from minirlhf.evaluation.stage import evaluate
from minirlhf.training.http_reward import RemoteConfig
from minirlhf.training.reward_sources import open_reward, the_one_reward
from minirlhf.training.setting import ReadingConfig, Setting


@dataclass(frozen=True)
class Evaluate:
    """Compares policies with the SFT model on the same held-out prompts: win rate, reward, KL, verdict."""

    policy: tuple[str, ...]
    """The policies, each as MODEL or LABEL=MODEL; a MODEL is a directory, a .gguf file or a hub name."""
    reference: Path
    """The SFT model (directory, .gguf, hub name): the other side of every comparison."""
    data: Path
    """Prompts: any of the known formats (.jsonl, .jsonl.gz); the test share of them is used."""
    out: Path
    """Directory to write; must not exist, or be empty."""
    reward_model: Path | None = None
    """Directory of the reward model that the policies were trained against: the proxy. Or --reward."""
    reward: str | None = None
    """SOURCE of the proxy: a reward model's directory or name, module:function, or http(s)://host/path.
    Without one the table has no score, and no word on hacking."""
    judge: str | None = None
    """SOURCE of the judge, likewise; left out, the embedded world's gold judge."""
    config: Path | None = None
    """A TOML file as every run leaves one (RUN/config.toml); flags override it."""
    seed: int = 0
    """Of the sampled responses."""
    device: Device = "auto"
    """Where to compute; auto is CUDA where there is one, else MPS, else the CPU."""
    reading: Flat[ReadingConfig] = field(default_factory=ReadingConfig)
    remote: Flat[RemoteConfig] = field(default_factory=RemoteConfig)
    evaluation: Flat[EvaluationConfig] = field(default_factory=EvaluationConfig)

    def run(self) -> None:
        """Samples, judges, and prints the table."""
        policies = {}
        for entry in self.policy:
            name, equals, directory = entry.partition("=")
            path = Path(directory if equals else entry)
            policies[name if equals else path.name] = path
        setting = Setting(self.seed, self.device, self.reading)
        proxy, judge = None, None
        if self.reward is not None or self.reward_model is not None:
            proxy = the_one_reward(self.reward_model, self.reward, setting, remote=self.remote)
        if self.judge is not None:
            judge = open_reward(self.judge, setting, remote=self.remote)
        evaluate(
            policies,
            self.reference,
            proxy,
            self.data,
            self.out,
            judge=judge,
            config=self.evaluation,
            setting=setting,
        )
