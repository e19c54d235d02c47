"""The configuration: its schema, and its composition by Hydra."""

from scaling_exps.config.compose import CONF, compose, dataset, recipes_for
from scaling_exps.config.schema import (
    GPT,
    RAMPS,
    VGG16,
    Checkpoint,
    Config,
    ConfigError,
    Cost,
    Custom,
    Dataset,
    FileDataset,
    Group,
    ImageDataset,
    LocalLaunch,
    Measure,
    Model,
    ResNet,
    ResNet50,
    Roberta,
    SlurmLaunch,
    Timm,
    TokenDataset,
    Wandb,
    keys,
)  # fmt: skip

__all__ = [
    "CONF", "GPT", "RAMPS", "VGG16", "Checkpoint", "Config", "ConfigError", "Cost", "Custom", "Dataset", "FileDataset",
    "Group", "ImageDataset", "LocalLaunch", "Measure", "Model", "ResNet", "ResNet50", "Roberta",
    "SlurmLaunch", "Timm", "TokenDataset", "Wandb", "compose", "dataset", "keys", "recipes_for",
]  # fmt: skip
