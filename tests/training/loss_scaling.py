"""fp16 with its loss scaler, as on a GPU that has no bf16. accelerate makes a scaler on GPUs only; torch has one for the CPU too."""

import torch
from accelerate import Accelerator


class ScalingAccelerator(Accelerator):
    """Computes in fp16 on the CPU and scales the loss."""

    def __init__(self, **settings):
        super().__init__(cpu=True)
        self.scaler, self.native_amp = torch.amp.GradScaler("cpu", init_scale=256.0), True

    @property
    def mixed_precision(self):
        return "fp16"

    def autocast(self, autocast_handler=None):
        return torch.autocast("cpu", torch.float16)
