import math

import pytest
import torch
from scipy import stats

from fastdiff.diffusion.schedules import CONTINUOUS, SCHEDULES, make_schedule
from fastdiff.diffusion.times import TIME_SAMPLINGS, sample_t
from fastdiff.errors import UserError

SIGMA = ("ve-sde", "edm")


def draw(schedule, sampling, n=20_000):
    return sample_t(schedule, n, sampling=sampling, generator=torch.Generator().manual_seed(0))


def fraction(schedule, t):
    """How far along its time axis a time lies, the inverse of `time_at`."""
    if schedule.name in SIGMA:
        return (t / schedule.t_min).log() / torch.tensor(schedule.t_max / schedule.t_min).double().log()
    return (t - schedule.t_min) / (schedule.t_max - schedule.t_min)


@pytest.mark.parametrize("name", CONTINUOUS)
@pytest.mark.parametrize("sampling", TIME_SAMPLINGS)
def test_times_have_the_distribution_they_are_named_after(name, sampling):
    schedule = make_schedule(name)
    if sampling == "logit-normal" and name in SIGMA:
        with pytest.raises(UserError, match=f"logit-normal needs a time in .* time of {name} is sigma"):
            draw(schedule, sampling)
        return
    t = draw(schedule, sampling)
    assert t.dtype == torch.float64
    assert schedule.t_min <= t.min()
    assert t.max() <= schedule.t_max
    normal = {"log-normal": stats.norm(-1.2, 1.2), "wide-log-normal": stats.norm(-1.1, 2.0)}
    if sampling in normal:
        values, law = -0.5 * schedule.log_snr(t), normal[sampling]
    else:
        values = fraction(schedule, t)
        law = stats.uniform() if sampling != "logit-normal" else stats.norm()
        values = values if sampling != "logit-normal" else values.logit()
    # A schedule's range cuts the normal's tails: so many of the times are at either end.
    ends = schedule.t_min, schedule.t_max
    cut = max(float((t == end).double().mean()) for end in ends) if sampling in normal else 0.0
    assert cut < {"log-normal": 0.003, "wide-log-normal": 0.05}.get(sampling, 1.0)
    assert stats.kstest(values.numpy(), law.cdf).statistic < 1.63 / 20_000**0.5 + cut
    assert torch.equal(t, draw(schedule, sampling))


@pytest.mark.parametrize("schedule", ["flow", "cosine", "vp-sde"])
def test_one_step_is_trained_from_the_noisiest_time(schedule):
    """Levels of sigma / alpha above 80 are t_max itself, where a single step starts: a share of 0.3%."""
    schedule = SCHEDULES[schedule]()
    t = TIME_SAMPLINGS["wide-log-normal"](schedule, 20_000, torch.Generator().manual_seed(0), "cpu")
    above = schedule.log_snr(t) < -2 * math.log(80)
    assert 0.001 < above.double().mean() < 0.006
    assert (t[above] == schedule.t_max).all()


@pytest.mark.parametrize("sampling", ["uniform", "low-discrepancy"])
def test_discrete_times_are_whole_and_equally_frequent(sampling):
    schedule = SCHEDULES["ddpm-linear"](T=10)
    t = draw(schedule, sampling, 100_000)
    assert t.dtype == torch.int64
    counts = torch.bincount(t, minlength=11)
    assert len(counts) == 11
    assert counts[0] == 0
    assert (counts[1:] - 10_000).abs().max() < 4 * (100_000 * 0.1 * 0.9) ** 0.5


def test_discrete_log_normal_and_logit_normal_times_are_the_nearest_levels():
    schedule = make_schedule("cosine")
    t = draw(schedule, "log-normal")
    assert t.dtype == torch.int64
    assert (t.min() >= 1) & (t.max() <= 1000)
    log_ratio = -0.5 * schedule.log_snr(t.double())
    assert log_ratio.median().item() == pytest.approx(-1.2, abs=0.03)
    t = draw(schedule, "logit-normal")
    assert (t.double() / 1000).logit().mean().item() == pytest.approx(0, abs=0.03)
    assert (t.double() / 1000).logit().std().item() == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("name", SCHEDULES)
def test_low_discrepancy_covers_every_stratum_and_lowers_the_variance_of_a_batch(name):
    schedule = make_schedule(name)
    generator = torch.Generator().manual_seed(0)
    means = {}
    for sampling in ("uniform", "low-discrepancy"):
        batches = [sample_t(schedule, 64, sampling=sampling, generator=generator).double() for _ in range(200)]
        means[sampling] = torch.stack([schedule.log_snr(t).clamp(-10, 10).mean() for t in batches])
    assert means["low-discrepancy"].var() < 0.1 * means["uniform"].var()
    pooled = (means["uniform"].var() / 200 + means["low-discrepancy"].var() / 200).sqrt()
    assert (means["low-discrepancy"].mean() - means["uniform"].mean()).abs() < 4 * pooled
    t = sample_t(schedule, 64, sampling="low-discrepancy", generator=generator)
    if name in CONTINUOUS:
        strata = (fraction(schedule, t).double() * 64).floor().long()
        assert len(set(strata.tolist())) >= 63  # a time on the edge of two may fall to either by rounding


@pytest.mark.parametrize("name", SCHEDULES)
def test_auto_is_the_schedule_s_own(name):
    schedule = make_schedule(name)
    own = "log-normal" if name == "edm" else "uniform"
    assert schedule.default_time_sampling == own
    assert torch.equal(draw(schedule, "auto", 50), draw(schedule, own, 50))


def test_discrete_uniform_times_are_randint_s():
    """The draws that earlier runs made."""
    t = sample_t(SCHEDULES["ddpm-linear"](T=1000), 50, generator=torch.Generator().manual_seed(3))
    assert torch.equal(t, torch.randint(1, 1001, (50,), generator=torch.Generator().manual_seed(3)))


def test_an_unknown_name_is_named():
    with pytest.raises(UserError, match="time sampling 'often' is unknown; choose one of auto, uniform"):
        sample_t(make_schedule("flow"), 3, sampling="often")
    with pytest.raises(UserError, match="time sampling 'often' is unknown; choose one of auto, uniform"):
        sample_t(make_schedule("cosine"), 3, sampling="often")


@pytest.mark.gpu
@pytest.mark.parametrize("name", SCHEDULES)
def test_times_are_drawn_on_a_gpu_with_no_sync(name):
    schedule = make_schedule(name)
    samplings = [s for s in TIME_SAMPLINGS if not (s == "logit-normal" and name in SIGMA)]
    for sampling in samplings:
        sample_t(schedule, 8, sampling=sampling, device="cuda")  # the first call may upload a table
    torch.cuda.set_sync_debug_mode("error")
    try:
        for sampling in samplings:
            t = sample_t(schedule, 8, sampling=sampling, device="cuda")
            assert t.device.type == "cuda"
            schedule.alpha(t), schedule.sigma(t), schedule.log_snr(t), schedule.c_noise(t)
    finally:
        torch.cuda.set_sync_debug_mode("default")
