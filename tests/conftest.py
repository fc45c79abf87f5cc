import os
import sys
from pathlib import Path

import torch

os.environ["WANDB_MODE"] = "offline"  # no test talks to a server
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.manual_seed(0)
