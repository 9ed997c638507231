"""How much the error at each noise level counts.

A weighting is a weight w(log-SNR) of the error of the estimated image, ||x0 - x0_hat||^2, whatever the network
predicts. (Some papers state the weight of ||eps - eps_hat||^2 = SNR ||x0 - x0_hat||^2; it is multiplied by SNR here.)
An objective converts it to a weight of its own error, so that one weighting is one loss for all of them. All is in
logarithms, where no infinite SNR meets a zero.

The exception is `uniform`, by tradition the plain error of whatever is predicted (L_simple for eps), so that it means
another w for each objective: `snr` for eps and score, `image` for x0, SNR + 1 for v (Salimans & Ho 2022, section 4),
(1 + sqrt(SNR))^2 for flow, and `edm` for edm.

The loss is a mean over the sampled noise levels: how often each is seen (--time-sampling and the schedule) is a weight
too, and no weighting divides it out.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

LogWeight = Callable[..., Tensor]  # (log-SNR (N,), gamma=, sigma_data=), the numbers being the run's -> log w (N,)

WEIGHTINGS: dict[str, LogWeight | None] = {
    # No w of its own, see above.
    "uniform": None,
    # w = 1: the plain error of the image, as `uniform` is for x0.
    "image": lambda log_snr, **_: torch.zeros_like(log_snr),
    # w = SNR: the plain error of the noise (Ho et al. 2020, eq. 14).
    "snr": lambda log_snr, **_: log_snr,
    # w = max(SNR, 1): the larger of the noise's and the image's error (Salimans & Ho 2022, section 4).
    "truncated-snr": lambda log_snr, **_: log_snr.clamp(min=0.0),
    # w = min(SNR, gamma): nearly clean levels no longer dominate (Hang et al. 2023, section 3.4).
    "min-snr": lambda log_snr, gamma, **_: log_snr.clamp(max=math.log(gamma)),
    # w = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 = SNR + 1 / sigma_data^2 (Karras et al. 2022, table 1).
    "edm": lambda log_snr, sigma_data, **_: (
        -F.logsigmoid(-log_snr - 2.0 * math.log(sigma_data)) - 2.0 * math.log(sigma_data)
    ),
    # w = SNR sigmoid(2 - log-SNR), a soft min(SNR, e^2): sigmoid for the noise (Kingma & Gao 2023, section 5). The
    # paper weighs the integral over log-SNR; here it is the mean over the sampled noise levels, see above.
    "sigmoid": lambda log_snr, **_: log_snr + F.logsigmoid(2.0 - log_snr),
}
