"""Where episodes come from: data sets, the images they hold and the sampler that draws episodes from them."""

from .glyphs import Glyphs
from .images import Images
from .module import EpisodeData
from .omniglot import Omniglot
from .sampler import Episodes, EpisodeSampler

__all__ = ["EpisodeData", "EpisodeSampler", "Episodes", "Glyphs", "Images", "Omniglot"]
