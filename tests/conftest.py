import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
torch.set_num_threads(2)
if not torch.cuda.is_available():    # kernels are tested in Triton's interpreter; it reads this when it is imported, later than here
    os.environ.setdefault('TRITON_INTERPRET', '1')
