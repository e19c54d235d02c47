"""Every key of the configuration: its name, type, range, unit and meaning, said here and nowhere else.

The values stand in conf/*.yaml. `build` turns plain values into these types and collects every fault; `keys` lists
them for docs/keys.md and for spelling hints. A group with cross-field conditions has a method `faults`.
"""

import difflib
import math
import types
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import msgspec

from scaling_exps.rules import OPTIMIZERS, BetaMap, Clip
from scaling_exps.words import nearest


class ConfigError(ValueError):
    """What the user typed cannot be used; the message says what was given, what is allowed, and what to do."""


def _is(meaning: str, unit: str = "", forms: str = "", **limits: Any) -> msgspec.Meta:
    """`forms`: examples of what it may be, where its type says too little."""
    return msgspec.Meta(description=meaning, extra={"unit": unit, "forms": forms}, **limits)


class Group(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A group of keys."""

    def faults(self) -> list[str]:
        """What its keys, each legal by itself, make wrong together."""
        return []


# Upper limits lie far beyond any use; they keep a slip of the finger from planning happily.
Fraction = Annotated[float, _is("", ge=0, le=1)]
Positive = Annotated[int, _is("", ge=1, le=2**20)]
Examples = Annotated[int, _is("", ge=1, le=10**12)]
Batch = Annotated[int, _is("", ge=1, le=2**24)]
Minutes = Annotated[float, _is("", gt=0, le=10**6)]


# ---- dataset ----


class _Dataset(Group, frozen=True, kw_only=True, tag_field="kind"):
    # its name says what is read, and is chosen by `dataset=NAME`
    path: Annotated[str | None, _is("folder or file of your own copy; null: embedded, or in SCALERUN_DATA")]
    revision: Annotated[str | None, _is("commit of the data set on the hub; null where it is not from there")]
    train_size: Annotated[Examples | None, _is("the first so many training examples; null: all", "examples")]
    test_size: Annotated[Examples | None, _is("the first so many test examples; null: all", "examples")]


class _Images(_Dataset, frozen=True, kw_only=True):
    shape: Annotated[list[Positive], _is("height, width, channels", "pixels", min_length=3, max_length=3)]
    classes: Annotated[int, _is("classes; of imagefolder 0: as many as its folder has", ge=0, le=2**20)]
    mean: Annotated[list[float], _is("of each channel, of pixels in [0, 1]", min_length=1)]
    std: Annotated[list[Annotated[float, _is("", gt=0)]], _is("of each channel", min_length=1)]
    flip: Annotated[bool, _is("flip half of the training images")]

    def faults(self) -> list[str]:
        channels = self.shape[2]
        counted = self.classes == 0 and getattr(self, "name", "") == "imagefolder"
        wrong = [] if self.classes >= 2 or counted else [f"dataset.classes={self.classes} must be >= 2"]
        if not len(self.mean) == len(self.std) == channels:
            wrong.append(f"dataset.mean={self.mean} dataset.std={self.std} must have {channels} values each (channels)")
        return wrong


class ImageDataset(_Images, frozen=True, kw_only=True, tag="images"):
    """Images that are held in memory."""

    name: Literal["digits", "cifar10"]
    shift: Annotated[int, _is("padding of the random crop", "pixels", ge=0, le=2**10)]
    label_noise: Annotated[Fraction, _is("share of labels drawn at random, afresh at each occurrence")]

    def faults(self) -> list[str]:
        lacking = [k for k in ("train_size", "test_size") if getattr(self, k) is None]
        return super().faults() + [f"dataset.{k}=null: {self.name} needs a number" for k in lacking]


class FileDataset(_Images, frozen=True, kw_only=True, tag="files"):
    """Images that are decoded as they are needed."""

    name: Literal["imagenet", "imagefolder"]
    area: Annotated[list[Fraction], _is("least and largest share of an image in a crop", min_length=2, max_length=2)]
    resize: Annotated[Positive, _is("shorter side of a test image before its central crop", "pixels")]

    def faults(self) -> list[str]:
        wrong = super().faults()
        if self.shape[2] != 3:
            wrong.append(f"dataset.shape={self.shape} must be [height, width, 3]: images are read as RGB")
        if not 0 < self.area[0] <= self.area[1]:
            wrong.append(f"dataset.area={self.area} must be [smallest, largest], in (0, 1]")
        if self.resize < max(self.shape[:2]):
            wrong.append(f"dataset.resize={self.resize} must be >= the image size {self.shape[:2]}")
        return wrong


class TokenDataset(_Dataset, frozen=True, kw_only=True, tag="tokens"):
    """Texts, as sequences of tokens; an example is a sequence."""

    name: Literal["stdlib", "text", "wikitext103", "wikibooks"]
    tokenizer: Annotated[str, _is("bytes, bpe (trained on the corpus), or a tokenizer of the hub or of a folder")]
    tokenizer_revision: Annotated[str | None, _is("commit of the hub's tokenizer; null: the one in the local cache")]
    vocab: Annotated[int, _is("token ids", ge=2, le=2**24)]
    context: Annotated[int, _is("length of a sequence", "tokens", ge=2, le=2**20)]
    mask: Annotated[float, _is("share of tokens that are hidden and predicted; 0 predicts the next token", ge=0, lt=1)]

    def faults(self) -> list[str]:
        if self.mask and round(self.mask * self.context) < 1:
            return [f"dataset.mask={self.mask} hides no token of {self.context}: raise it, or dataset.context"]
        return []


Dataset = ImageDataset | FileDataset | TokenDataset


# ---- model ----

Norm = Literal["batch", "group", "layer", "none"]
Width = Annotated[int, _is("", ge=1, le=2**16)]
ANY_NORM = "what the network normalises over; refused where the network says otherwise"


class _Model(Group, frozen=True, kw_only=True, tag_field="kind"):
    name: Annotated[str, _is("what the network is called in tables; of `timm`: which network")]

    @property
    def normalises_over_batch(self) -> bool:
        """Whether examples of a micro-batch see each other, so that its size is science."""
        return getattr(self, "norm", None) == "batch"


GROUP_NORM = "group: GroupNorm in groups of 4 channels"


def _groups_of_4(width: int, norm: str) -> list[str]:
    if norm == "group" and width % 4:
        return [f"model.width={width} must be a multiple of 4 with model.norm=group (groups of 4)"]
    return []


class ResNet(_Model, frozen=True, kw_only=True, tag="resnet"):
    """He et al. 2016, section 4.2: the CIFAR ResNet of depth 6n + 2."""

    depth: Annotated[int, _is("layers, 6n + 2", ge=8, le=10**4)]
    width: Annotated[Width, _is("channels of the first stage; the others have 2 and 4 times as many")]
    norm: Annotated[Literal["batch", "group"], _is(GROUP_NORM)]

    def faults(self) -> list[str]:
        wrong = [f"model.depth={self.depth} must be 6n + 2: 8, 14, 20, ..."] if (self.depth - 2) % 6 else []
        return wrong + _groups_of_4(self.width, self.norm)


class ResNet50(_Model, frozen=True, kw_only=True, tag="resnet50"):
    """timm's ResNet-50; up to 64 pixels in CIFAR form."""

    norm: Annotated[Literal["batch"], _is("it comes with batch normalisation only")]


class VGG16(_Model, frozen=True, kw_only=True, tag="vgg16"):
    """torchvision's vgg16_bn features, with either normalisation, and one linear layer."""

    width: Annotated[Width, _is("channels of the first layer (VGG-16: 64); the others in proportion")]
    norm: Annotated[Literal["batch", "group"], _is(GROUP_NORM)]

    def faults(self) -> list[str]:
        return _groups_of_4(self.width, self.norm)


class Timm(_Model, frozen=True, kw_only=True, tag="timm"):
    """Any network of timm, untrained."""

    options: Annotated[dict[str, Any], _is("keywords of timm.create_model: model.options={drop_path_rate:0.1}")]
    norm: Annotated[Norm, _is(ANY_NORM)]


class Custom(_Model, frozen=True, kw_only=True, tag="custom"):
    """Your own network: a function that returns a torch.nn.Module."""

    factory: Annotated[str | None, _is("package.module:function of shape=(H, W, C), classes or vocab, context")]
    options: Annotated[dict[str, Any], _is("further keywords of the function")]
    norm: Annotated[Norm, _is(ANY_NORM)]

    def faults(self) -> list[str]:
        module, _, function = (self.factory or "").partition(":")
        return [] if module and function else [f"model.factory={self.factory!r} must be package.module:function"]


class _Language(_Model, frozen=True, kw_only=True):
    layers: Annotated[int, _is("transformer layers", ge=1, le=10**4)]
    width: Annotated[Width, _is("features of a token")]
    heads: Annotated[Width, _is("attention heads; they divide the width")]
    context: Annotated[Positive | None, _is("positions that it has; null: dataset.context", "tokens")]
    dropout: Annotated[float, _is("share of features dropped", ge=0, lt=1)]
    norm: Annotated[Literal["layer"], _is("layer normalisation")]

    def faults(self) -> list[str]:
        if self.width % self.heads:
            return [f"model.width={self.width} must be a multiple of model.heads={self.heads}"]
        return []


class GPT(_Language, frozen=True, kw_only=True, tag="gpt"):
    """transformers' GPT-2 from a config: predicts the next token."""


class Roberta(_Language, frozen=True, kw_only=True, tag="roberta"):
    """transformers' RoBERTa from a config: predicts hidden tokens."""


Model = ResNet | ResNet50 | VGG16 | Timm | Custom | GPT | Roberta


# ---- recipe ----

Trainable = Literal["adam", "adamw", "rmsprop", "invariant_adam", "paper_adam", "paper_rmsprop", "sgd"]
assert set(get_args(Trainable)) == {name for name, o in OPTIMIZERS.items() if o.trainable}
Beta = Annotated[float, _is("", ge=0, lt=1)]
Strength = Annotated[float, _is("", ge=0, le=10**6)]


class Recipe(Group, frozen=True, kw_only=True):
    """The tuned reference point. Fractions are of its duration."""

    optimizers: Annotated[list[Trainable], _is("for which optimizers these numbers are meant", min_length=1)]
    batch: Annotated[Batch, _is("global batch at which it was tuned", "examples")]
    micro_batch: Annotated[Batch, _is("examples of one backward pass; what batch normalisation sees", "examples")]
    lr: Annotated[float, _is("peak learning rate", gt=0, le=10**6)]
    beta1: Annotated[Beta | None, _is("decay of the average of gradients (Adam), a step; null: not tuned")]
    beta2: Annotated[Beta | None, _is("decay of the average of squared gradients, a step; null: not tuned")]
    momentum: Annotated[Beta | None, _is("of SGD, a step; null: not tuned")]
    eps: Annotated[Strength, _is("added to the root of the second moment", "gradient")]
    l2: Annotated[Strength, _is("weight decay inside the gradient (all but adamw and invariant_adam)")]
    decoupled_decay: Annotated[
        Strength, _is("weight decay outside the gradient, lr times this a step (adamw, invariant_adam)")
    ]
    epochs: Annotated[Annotated[float, _is("", gt=0, le=10**6)] | None, _is("duration; give it or samples", "epochs")]
    samples: Annotated[Examples | None, _is("duration; give it or epochs", "examples")]
    warmup_fraction: Annotated[Fraction, _is("length of the warm-up")]
    warmup: Annotated[Literal["geometric", "linear"], _is("its form")]
    warmup_from: Annotated[Fraction, _is("share of the peak at the first sample")]
    decay: Annotated[
        Literal["constant", "milestones", "cosine", "linear", "inverse_sqrt"], _is("what follows the warm-up")
    ]
    milestones_fraction: Annotated[list[Fraction], _is("where decay=milestones lowers the rate")]
    gamma: Annotated[float, _is("what a milestone multiplies the rate by", gt=0, le=1)]
    freeze_last: Annotated[bool, _is("keep the last linear layer at N(0, 0.01^2), as the authors' VGG")]
    statistics_samples: Annotated[Examples, _is("training examples for BN's evaluation statistics", "examples")]
    clip: Annotated[
        Annotated[float, _is("", gt=0, le=10**6)] | None,
        _is("largest norm of a step's whole gradient, which is scaled down to it; null: none", "gradient"),
    ]
    ema: Annotated[
        Annotated[float, _is("", gt=0, lt=1)] | None,
        _is(
            "decay a step, at the base batch, of an average of the weights: it begins at the initial ones and is what "
            "evaluations see; null: none. Every rule but none makes it ema^kappa: the average over the same samples"
        ),
    ]
    stop_after: Annotated[
        Examples | None, _is("end here, on the schedule of the whole duration; null: at its end", "examples")
    ]
    start_from: Annotated[
        str | None,
        _is("begin with these weights: a finished run's folder, a checkpoint, or safetensors; null: drawn by the seed"),
    ]

    def faults(self) -> list[str]:
        wrong = []
        if (self.epochs is None) == (self.samples is None):
            wrong.append(f"recipe.epochs={self.epochs} recipe.samples={self.samples}: give exactly one, the other null")
        if self.warmup == "geometric" and self.warmup_from == 0:
            wrong.append("recipe.warmup_from=0.0 must be > 0 for recipe.warmup=geometric")
        if self.decay == "inverse_sqrt" and self.warmup_fraction == 0:  # its peak would be that of the first step
            wrong.append("recipe.decay=inverse_sqrt falls from the end of the warm-up: give recipe.warmup_fraction > 0")
        return wrong


# ---- where and how it runs ----

Devices = Annotated[Positive | Literal["auto"], _is("processes of a run, one a GPU; auto: the most that fit")]


Elastic = Annotated[
    bool,
    _is("a begun run may go on with another number of processes: the same to 1e-5, not to the bit; its records say so"),
]


Shard = Annotated[
    bool,
    _is("cut weights, gradients, moments over the devices (FSDP2), for networks that do not fit one; the same to 1e-5"),
]


class LocalLaunch(Group, frozen=True, kw_only=True, tag_field="name", tag="local"):
    """On this machine."""

    devices: Devices
    elastic: Elastic
    parallel: Annotated[Positive, _is("runs of a sweep side by side")]
    compile: Annotated[
        bool | Literal["auto"],
        _is("torch.compile the network; auto: where two probes on this machine say that a run then ends sooner"),
    ]
    shard: Shard
    minutes: Annotated[Minutes | None, _is("after so long runs save and stop; null: no limit", "minutes")]


class SlurmLaunch(Group, frozen=True, kw_only=True, tag_field="name", tag="slurm"):
    """On a SLURM cluster. null leaves a setting to the site's defaults."""

    devices: Devices
    elastic: Elastic
    compile: Annotated[bool, _is("torch.compile the network")]
    shard: Shard
    max_devices: Annotated[Positive, _is("processes that devices=auto may take for one run")]
    devices_per_node: Annotated[Positive, _is("processes on a node")]
    gpus: Annotated[bool, _is("a GPU for each process; false: CPUs only")]
    cpus_per_task: Annotated[Positive, _is("CPUs of a process")]
    memory_gb: Annotated[Annotated[float, _is("", gt=0, le=10**6)] | None, _is("memory of a node", "GB")]
    minutes: Annotated[Positive, _is("wall clock of a job; a longer run saves, requeues itself and goes on", "minutes")]
    signal_seconds: Annotated[Positive, _is("how long before that limit a run saves", "seconds")]
    requeues: Annotated[int, _is("restarts of a run whose process was killed", ge=0, le=2**20)]
    array_parallelism: Annotated[Positive, _is("runs of a job array at one time")]
    partition: Annotated[str | None, _is("sbatch --partition")]
    account: Annotated[str | None, _is("sbatch --account")]
    qos: Annotated[str | None, _is("sbatch --qos")]
    constraint: Annotated[str | None, _is("sbatch --constraint")]
    exclude: Annotated[str | None, _is("sbatch --exclude")]
    sbatch: Annotated[dict[str, str | int | bool], _is("further options: {gres: 'gpu:a100:1', exclusive: true}")]
    setup: Annotated[list[str], _is("lines of the job script before srun: module load cuda")]
    container: Annotated[list[str], _is("words put before python: [apptainer, exec, --nv, image.sif]")]
    python: Annotated[str | None, _is("on the nodes; null: the one that submits")]
    node_local: Annotated[list[str], _is("folders that each node has for itself: code and runs there are refused")]
    wait: Annotated[bool, _is("follow until every run has ended")]
    dry_run: Annotated[bool, _is("print the job scripts, and submit nothing")]

    def faults(self) -> list[str]:
        limit = 60 * self.minutes
        if self.signal_seconds < limit:
            return []
        return [f"launch.signal_seconds={self.signal_seconds} must be below the time limit, {limit} s (launch.minutes)"]


Launch = LocalLaunch | SlurmLaunch


class Measure(Group, frozen=True, kw_only=True):
    """What is recorded. It decides nothing about the run and is no part of its id."""

    evaluations: Annotated[Positive, _is("on the test set, evenly spaced in samples, the last at the end")]
    train_records: Annotated[Positive, _is("each is the mean loss of the samples since the last")]
    noise: Annotated[
        Literal["auto", "free", "full", "none"],
        _is("gradient noise: free (of a step's micro-batches), full (of examples of its own), auto (free, else full)"),
    ]
    noise_records: Annotated[Positive, _is("measurements of the noise, evenly spaced in samples")]
    noise_examples: Annotated[
        Annotated[int, _is("", ge=2, le=10**12)] | None,
        _is("training examples of a full measurement; null: 256, or 8 gradients where that is more", "examples"),
    ]
    noise_unit: Annotated[
        Batch | None, _is("examples in each of its gradients; null: up to 16, with BN the micro-batch", "examples")
    ]


Card = Literal["a100", "h100", "h200", "l4", "l40s", "rtx4090", "t4", "v100"]


class Cost(Group, frozen=True, kw_only=True):
    """What `scalerun plan` bases time and money on. Finished runs of the same network in runs_dir come first."""

    probe: Annotated[bool, _is("take a few real steps here, in a process of its own; `cost=probe` is the same")]
    device: Annotated[Card | None, _is("the card to plan for; null: this machine")]
    share: Annotated[Annotated[float, _is("", gt=0, le=1)], _is("of the card's peak that training reaches")]
    price: Annotated[
        Annotated[float, _is("", gt=0, le=10**6)] | None, _is("of an hour of one device; null: none is shown", "money")
    ]


Gap = Annotated[float, _is("", gt=0, le=10**6)]


class Margin(Group, frozen=True, kw_only=True):
    """The largest gap to the base run that still is the same run; null is not judged. See docs/comparison.md."""

    auto: Annotated[
        bool,
        _is(
            "margin=auto: from the base runs' spread s over seeds, before the other runs start: "
            "m = s√2·(q(1 - 0.05/K, n) + t(0.9, n - 1))/√n, rounded up to 1, 2 or 5 · 10^k"
        ),
    ]
    test_accuracy: Annotated[Annotated[float, _is("", gt=0, lt=1)] | None, _is("share of the test set")]
    test_loss: Annotated[Gap | None, _is("at the end", "nats")]
    train_loss: Annotated[Gap | None, _is("mean of the last tenth of training", "nats")]
    trajectory: Annotated[Gap | None, _is("mean |difference| of train losses at equal samples", "nats")]
    weight_norm: Annotated[Gap | None, _is("at the end")]
    perplexity: Annotated[Gap | None, _is("at the end")]

    def numbers(self) -> dict[str, float]:
        """Metric -> margin, of those that have one."""
        return {k: v for k, v in msgspec.structs.asdict(self).items() if k != "auto" and v is not None}

    def faults(self) -> list[str]:
        if self.auto and (given := self.numbers()):
            return [f"margin=auto and margin.{next(iter(given))}: margins are proposed or given; drop one of the two"]
        return []


RAMPS = (
    "[[0,256],[0.1,1024]], {samples: [[0,256],[1000000,1024]]}, {tokens: [[0,256],[1000000000,1024]]}, [1/4,1/2,1], "
    "auto, seesaw; docs/ramps.md says what each is"
)


class Ramp(Group, frozen=True, kw_only=True):
    """A batch that changes within the run; `ramp=X` is `ramp.at=X`. See docs/ramps.md."""

    at: Annotated[
        list[list[float] | float | str]
        | dict[Literal["samples", "tokens"], list[list[float]]]
        | Literal["auto", "seesaw"]
        | None,
        _is(
            "stages [start, batch] with starts as shares of the schedule, in samples or in tokens; a third number is "
            "the B_noise there, which moves v; [1/4,1/2,1]: shares of the largest batch, equally long; auto: from the "
            "base run's noise; seesaw: twice the batch where the schedule has halved the rate",
            forms=RAMPS,
        ),
    ]
    tolerance: Annotated[float, _is("of auto: largest predicted change of the displacement", gt=0, lt=1)]
    stages: Annotated[int, _is("of auto and seesaw: the most stages", ge=1, le=100)]
    largest: Annotated[Batch | None, _is("of auto and seesaw: no larger batch; null: the rule's limit", "examples")]


class Checkpoint(Group, frozen=True, kw_only=True):
    """What a kill can cost, and what stays for `fork` and later measurements."""

    minutes: Annotated[Minutes, _is("between checkpoints; one is always written at the end", "minutes")]
    keep: Annotated[list[Annotated[float, _is("", gt=0, le=1)]], _is("shares of the run at which a checkpoint is kept")]


class Wandb(Group, frozen=True, kw_only=True):
    """Where the mirror of the records lies."""

    project: Annotated[str | None, _is("null: WANDB_PROJECT, or scalerun")]
    entity: Annotated[str | None, _is("user or team; null: WANDB_ENTITY, or yours")]
    tags: Annotated[list[str], _is("tags of every run, beside its own")]


# ---- all of it ----

Ell = Annotated[int, _is("", ge=1, le=10**3)]
Name = Annotated[str, _is("", min_length=1)]
Seed = Annotated[int, _is("", ge=0, lt=2**31)]
NoiseScale = Annotated[float, _is("", gt=0, le=10**15)]


class Config(Group, frozen=True, kw_only=True):
    """One composed command."""

    model: Model
    dataset: Dataset
    optimizer: Annotated[Trainable, _is("docs/rules.md says what each is")]
    recipe: Recipe
    launch: Launch
    measure: Measure
    margin: Margin
    looks: Annotated[
        list[Annotated[int, _is("", ge=3, le=10**3)]] | None,
        _is("seeds at which the report may judge, the last the final number; null: once, at the end", "seeds"),
    ]
    checkpoint: Checkpoint
    wandb: Wandb
    cost: Cost
    batch: Annotated[
        Batch | list[Batch] | None,
        _is("examples of a step, on all devices and accumulation; null: the recipe's; a list is a sweep", "examples"),
    ]
    ramp: Ramp
    base: Annotated[
        Literal["auto", "none"], _is("auto: a sweep gets the base runs of its recipe, which its report compares with")
    ]
    seed: Annotated[Seed | list[Seed], _is("of weights, data order and augmentation; a list is a sweep")]
    goal: Annotated[Literal["match", "best"], _is("default rule: for the same run (match), or the best at this batch")]
    rule: Annotated[Name | list[Name] | None, _is("scaling rule; null: the default for the goal; a list is a sweep")]
    tested: Annotated[list[Name] | None, _is("rules under test, others are controls; null: by the rules' own goals")]
    beta_map: Annotated[BetaMap, _is("linear: 1 - beta -> kappa (1 - beta); power: beta -> beta^kappa")]
    clip: Annotated[
        Clip,
        _is(
            "recipe.clip at another batch: keep, or rule: c/sqrt(kappa), the same share of steps where noise dominates"
        ),
    ]
    noise_scale: Annotated[NoiseScale | None, _is("measured B_noise, for the rules that need it", "examples")]
    duration: Annotated[float, _is("multiple of the recipe's budget in samples", gt=0, le=10**6)]
    svag: Annotated[Ell | list[Ell], _is("SVAG's ell; 1 is plain training; a list is a sweep")]
    precision: Annotated[
        Literal["float32", "bfloat16", "auto"],
        _is("bfloat16: by autocast; auto: bfloat16 where this machine's CPU has instructions for it, else float32"),
    ]
    logger: Annotated[
        Literal["wandb", "tensorboard", "csv", "none"] | list[Literal["wandb", "tensorboard", "csv"]],
        _is("mirrors of the records; wandb is online when you are logged in; the others lie in the run's folder"),
    ]
    runs_dir: Annotated[str, _is("folder of runs", min_length=1)]
    noise_from: Annotated[
        str | None, _is("run, folder of runs or a NoiseProbe's file whose noise records `plan` uses; null: runs_dir")
    ]
    experiment: Annotated[str | None, _is("file of conf/experiment")] = None
    words: list[str] = []  # of the command line; no key, so it has no meaning in the table of keys

    def faults(self) -> list[str]:
        looks, wrong = self.looks or [], []
        if looks != sorted(set(looks)):
            wrong.append(f"looks={looks} must rise: each is the number of seeds at a look, [3, 6, 10]")
        if "tensorboard" in self.logger and find_spec("tensorboard") is None:
            wrong.append("logger=tensorboard needs its package: pip install 'scalerun[tensorboard]'; or logger=csv")
        return wrong


# ---- reading plain values ----


def build(kind: Any, raw: Any, key: str = "") -> Any:
    """Plain values as a group of the type `kind` (or the one of a union that `raw` names), checked.

    Raises:
        ConfigError: with every fault, one a line.
    """
    faults: list[str] = []
    value = _value(kind, raw, key, faults)
    if faults:
        raise ConfigError("\n".join(faults))
    return value


def _value(kind: Any, raw: Any, key: str, faults: list[str]) -> Any:
    if groups := _groups(kind):
        return _group(groups, raw, key, faults)
    try:
        value = msgspec.convert(raw, kind)
        if not _sound(value):
            raise msgspec.ValidationError
        return value
    except msgspec.ValidationError:
        quoted = "; without the inner quotes it is a list" if isinstance(raw, str) and raw.startswith("[") else ""
        hint = nearest(raw, _options(kind)) if isinstance(raw, str) else ""
        faults.append(f"{key}={raw!r}{hint} must be {allowed(kind)}{_said(kind)}{quoted}")
        return None


def _group(groups: list[type[Group]], raw: Any, key: str, faults: list[str]) -> Any:
    tag, by = groups[0].__struct_config__.tag_field, {g.__struct_config__.tag: g for g in groups}
    kind = by.get(raw.get(tag) if tag else None) if isinstance(raw, dict) else None
    if kind is None:
        given = f"{key}.{tag}={raw.get(tag)!r}" if isinstance(raw, dict) else f"{key}={raw!r}"
        keys = ", ".join(f"{key}.{f.name}" for f in msgspec.structs.fields(groups[0]) if f.name != "words")
        options = "one of " + ", ".join(map(str, by)) if tag else f"given by its keys: {keys}"
        faults.append(f"{given} must be {options}")
        return None
    fields = {f.name: f for f in msgspec.structs.fields(kind)}
    prefix, before = key and key + ".", len(faults)
    for name in sorted(set(raw) - set(fields) - {tag}):
        close = difflib.get_close_matches(str(name), fields, 1)
        hint = f" (did you mean {prefix + close[0]!r}?)" if close else ""
        known = ", ".join(n for n in fields if n != "words")
        faults.append(f"unknown key {prefix + str(name)!r}{hint}; allowed: {known}")
    if missing := [n for n, f in fields.items() if n not in raw and f.required]:
        faults += [f"{prefix + n} is missing: {allowed(fields[n].type)}{_said(fields[n].type)}" for n in missing]
        faults.append(
            "give them; a file can take over another's of its group: it begins with `defaults: [NAME, _self_]`"
        )
    values = {n: _value(f.type, raw[n], prefix + n, faults) for n, f in fields.items() if n in raw}
    if len(faults) > before:
        return None
    group = kind(**values)
    faults.extend(group.faults())
    return group


def _groups(kind: Any) -> list[type[Group]]:
    """The groups that a field may hold; none for a plain value."""
    members = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    return [m for m in members if isinstance(m, type) and issubclass(m, Group)]


def _sound(value: Any) -> bool:
    """Neither nan, inf nor a null byte anywhere: no file and no JSON holds them."""
    if isinstance(value, dict):
        return _sound([*value, *value.values()])
    if isinstance(value, list):
        return all(map(_sound, value))
    return "\0" not in value if isinstance(value, str) else not isinstance(value, float) or math.isfinite(value)


# ---- describing types ----


def _annotations(kind: Any) -> tuple[Any, dict[str, Any]]:
    """A type without its annotations, and all that these say of it."""
    if get_origin(kind) is not Annotated:
        return kind, {}
    names = ("ge", "gt", "le", "lt", "min_length", "max_length", "description", "extra")
    metas = kind.__metadata__
    return get_args(kind)[0], {n: x for m in metas for n in names if (x := getattr(m, n)) not in (None, "")}


def _said(kind: Any) -> str:
    said = _annotations(kind)[1]
    return f" ({said['description']})" if "description" in said and not said["extra"].get("forms") else ""


def allowed(kind: Any) -> str:
    """What a value of this type may be, in words.

    >>> allowed(Annotated[float, msgspec.Meta(gt=0, le=1)] | None)
    'a number in (0, 1], or null'
    """
    kind, limits = _annotations(kind)
    origin, inside = get_origin(kind), get_args(kind)
    if forms := limits.get("extra", {}).get("forms"):
        return f"one of {forms}"
    if origin in (Union, types.UnionType):
        return ", or ".join(map(allowed, sorted(inside, key=lambda k: k is type(None))))
    if origin is Literal:
        return "one of " * (len(inside) > 1) + ", ".join(map(str, inside))
    if origin is list:
        least, most = limits.get("min_length"), limits.get("max_length")
        count = "" if least is None else f" of {least}" if least == most else " of at least one"
        return f"a list{count}, each {allowed(inside[0]).removeprefix('an ').removeprefix('a ')}"
    if kind is str and "min_length" in limits:
        return "text that is not empty"
    words = {int: "an integer", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    name = words.get(kind, "keywords {KEY:VALUE}")
    low = next((text + _short(limits[n]) for n, text in (("ge", "["), ("gt", "(")) if n in limits), "")
    high = next((_short(limits[n]) + text for n, text in (("le", "]"), ("lt", ")")) if n in limits), "")
    if low and not high:
        return f"{name} {'>=' if low[0] == '[' else '>'} {low[1:]}"
    return f"{name} in {low}, {high}" if low else name


def _options(kind: Any) -> tuple[str, ...]:
    """The words that a value of this type may be, where there are but few."""
    kind, _ = _annotations(kind)
    if get_origin(kind) in (Union, types.UnionType):
        return tuple(word for k in get_args(kind) for word in _options(k))
    return ("true", "false") if kind is bool else tuple(map(str, get_args(kind))) if get_origin(kind) is Literal else ()


def _short(limit: float) -> str:
    """A limit as text, great powers as such: 2^24, 10^6."""
    if limit < 10**6:
        return str(limit)
    base = 10 if str(limit).strip("0") == "1" else 2
    return f"{base}^{round(math.log(limit, base))}"


@dataclass(frozen=True)
class Key:
    """A key as a person types it; `variants`: the kinds of its group that have it, empty for all."""

    name: str
    allowed: str
    unit: str
    meaning: str
    variants: tuple[str, ...] = ()
    options: tuple[str, ...] = ()  # the words that it may be


@cache
def keys(kind: type[Group] = Config, prefix: str = "") -> list[Key]:
    """Every key of the configuration, in the order of the schema; one that means several things, once for each."""
    rows: list[Key] = []
    for field in msgspec.structs.fields(kind):
        name, (_, said), groups = prefix + field.name, _annotations(field.type), _groups(field.type)
        if "description" in said:
            rows.append(
                Key(name, allowed(field.type), said["extra"]["unit"], said["description"], (), _options(field.type))
            )
        tags: dict[Key, list[str]] = {}
        for group in groups:
            for key in keys(group, f"{name}."):
                tags.setdefault(key, []).append(str(group.__struct_config__.tag))
        order = list(dict.fromkeys(key.name for key in tags))
        for key in sorted(tags, key=lambda k: order.index(k.name)):
            rows.append(replace(key, variants=() if len(tags[key]) == len(groups) else tuple(tags[key])))
    return rows
