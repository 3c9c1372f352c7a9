"""Where episodes come from: data sets, the images they hold and the samplers that draw episodes from them."""

from .glyphs import Glyphs
from .image_folder import ImageFolder
from .images import Images
from .mini_imagenet import MiniImageNet
from .module import EpisodeData, ImageData
from .omniglot import Omniglot
from .sampler import Episodes, EpisodeSampler, Sampler
from .sinusoid import Sinusoid
from .torch_dataset import TorchDataset

__all__ = [
    "EpisodeData",
    "EpisodeSampler",
    "Episodes",
    "Glyphs",
    "ImageData",
    "ImageFolder",
    "Images",
    "MiniImageNet",
    "Omniglot",
    "Sampler",
    "Sinusoid",
    "TorchDataset",
]
