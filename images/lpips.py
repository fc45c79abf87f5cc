"""LPIPS, the perceptual distance (Zhang et al. 2018, arXiv:1801.03924), by its authors' package."""
import pickle
import warnings
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from images import SettingsError, one_line

SMALLEST = dict(vgg=16, alex=32)  # pixels: smaller sides are enlarged, for the networks halve them
# what packages, downloads and files raise; anything else is a fault of the program and keeps its traceback
FOREIGN = (ImportError, OSError, EOFError, RuntimeError, pickle.UnpicklingError)


@cache
def load_lpips(net: str, path: str | None = None) -> nn.Module:
    """The package's network on VGG-16 ("vgg") or AlexNet ("alex"), frozen, with torchvision's weights of the file
    `path`, or downloaded. Raises SettingsError where the package or the weights are missing."""
    try:
        # The package first draws random weights. Without the fork, the run's random numbers would depend on when.
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it calls torchvision in a deprecated way
            from lpips import LPIPS
            model = LPIPS(net=net, pnet_rand=True, verbose=False)
        if path:
            weights = torch.load(path, map_location="cpu", weights_only=True)
        else:
            from torchvision.models import AlexNet_Weights, VGG16_Weights
            source = dict(vgg=VGG16_Weights.IMAGENET1K_V1, alex=AlexNet_Weights.IMAGENET1K_V1)[net]
            weights = source.get_state_dict(weights_only=True, check_hash=True)
        # the package's slice2.5.weight is torchvision's features.5.weight
        names = {name: "features." + name.split(".", 1)[1] for name in model.net.state_dict()}
        model.net.load_state_dict({name: weights[theirs] for name, theirs in names.items()})
    except (KeyError, TypeError, IndexError):
        raise SettingsError(f"{path} holds no weights of torchvision's {net}") from None
    except FOREIGN as failure:
        said = one_line(getattr(failure, "reason", failure))[:200]  # of weights of other shapes it is long
        raise SettingsError(f"{type(failure).__name__}: {said}") from failure
    return model.eval().requires_grad_(False)


def lpips_distance(a: Tensor, b: Tensor, net: str, path: str | None = None) -> Tensor:
    """(B,) LPIPS between images (B, 1 or 3, H, W) in [-1, 1]."""
    factor = -(-SMALLEST[net] // min(a.shape[2:]))
    model = load_lpips(net, path).to(a.device)
    return model(*(F.interpolate(image, scale_factor=factor) for image in (a, b))).flatten()
