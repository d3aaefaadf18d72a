import pytest
import torch

from optimum_dsa import Calibration, DSAConfig

from ..tiny import tiny_llama, tokens
from .toy import judge


@pytest.fixture
def objective():
    model = tiny_llama()
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data *= 3  # or nothing that is removed would matter
    return judge(model, Calibration({"input_ids": tokens()}, "x"), tokens(4, 16, seed=5), DSAConfig(0.6), top=30)
