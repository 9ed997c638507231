import gzip
import json

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from fastdiff.errors import UserError
from fastdiff.reporting.profile_report import IDLE_LIMIT, next_step, write_report
from fastdiff.reporting.profiling import (
    CATEGORIES,
    DRAIN,
    STEP,
    Event,
    Profile,
    analyse,
    classify,
    op_bytes,
    read_trace,
    self_time,
    shared_time,
)
from kernels import REGISTRY, adam_ema_, add_group_norm_silu, group_norm_silu

NAMES = {
    "conv": [
        "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64_warpgroupsize1x1x1_kernel",
        "sm80_xmma_wgrad_implicit_gemm_indexed_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x32_stage4_kernel",
        "void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816dgrad_optimized_bf16_128x128_32x4_nhwc>(Params)",
        "cudnn_infer_ampere_scudnn_128x64_relu_interior_nn_v1",
        "void implicit_convolve_sgemm<float, float, 1024, 5, 5, 3, 3, 3, 1, true, false, true>(int, int, int)",
        "triton_tem_fused_convolution_4",
        "aten::mkldnn_convolution",
        "aten::convolution_backward",
        "autograd::engine::evaluate_function: ConvolutionBackward0",
    ],
    "norm": [
        "forward_tile",
        "forward_loop",
        "backward_tile",
        "backward_loop",
        "forward_tile_3",
        "void at::native::(anonymous namespace)::RowwiseMomentsCUDAKernel<float>(long, float, float const*, float*)",
        "void at::native::(anonymous namespace)::ComputeFusedParamsCUDAKernel<float>(long, long, float const*)",
        "triton_red_fused_native_group_norm_native_group_norm_backward_silu_7",
        "triton_poi_fused_convolution_native_group_norm_silu_3",
        "aten::native_group_norm",
        "aten::native_group_norm_backward",
        "fastdiff_kernels::group_norm_silu_backward",
    ],
    "attention": [
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 64, 4, false, false>>(Flash_fwd_params)",
        "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>(Flash_bwd_params)",
        "fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel<...>::Params)",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3_64x128x128_4x1x1_kernel0_0",
        "triton_per_fused__softmax_5",
        "merge_kernel",
        "triton_tem_fused_flex_attention_0",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
    ],
    "matmul": [
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x64x64_warpgroupsize1x1x1_execute_segment_k_off_kernel",
        "ampere_bf16_s16816gemm_bf16_128x64_ldg8_f2f_stages_64x4_tn",
        "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>(cublasLt::cublasSplitKParams<float>)",
        "triton_tem_fused_addmm_2",
        "aten::addmm",
    ],
    "pointwise": [
        "triton_poi_fused_add_silu_12",
        "triton_red_fused_sum_3",
        "triton_per_fused_mean_0",
        "void at::native::vectorized_elementwise_kernel<4, at::native::silu_kernel(...)::{lambda()#1}>(int, ...)",
        "void at::native::(anonymous namespace)::distribution_elementwise_grid_stride_kernel<float, 4>(long, ...)",
        "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::MeanOps<float>>>(...)",
        "aten::silu",
        "SiluBackward0",
    ],
    "optimizer": [
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<TensorListMetadata<4>, FusedAdam>",
        "adam_ema_kernel",
        "ema_kernel",
        "triton_for_fused_1",
        "aten::_foreach_lerp_",
        "aten::_fused_adamw_",
    ],
    "copy": [
        "Memcpy DtoD (Device -> Device)",
        "Memset (Device)",
        "void cudnn::ops::nchwToNhwcKernel<__nv_bfloat16, __nv_bfloat16, float, false, true>(...)",
        "void at::native::(anonymous namespace)::CatArrayBatchedCopy_aligned16_contig<OpaqueType<2u>, unsigned int, 4>",
        "void at::native::elementwise_kernel<128, 4, at::native::direct_copy_kernel_cuda(...)>(int, ...)",
        "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>(int, ...)",
        "aten::copy_",
        "aten::cat",
    ],
    "data": ["void dali::kernels::BatchedCopyKernel<...>(...)"],
    "other": ["aten::empty", "aten::as_strided", "aten::view", "aten::_local_scalar_dense"],
}


@pytest.mark.parametrize(("category", "name"), [(c, n) for c, names in NAMES.items() for n in names])
def test_names_fall_into_their_categories(category, name):
    assert category in CATEGORIES
    assert classify(name) == category


def test_every_kernel_of_ours_has_a_category():
    names = [f"fastdiff_kernels::{spec.op.__name__}" for spec in REGISTRY.values()]
    assert names
    assert {classify(name) for name in names} <= {"norm", "optimizer", "attention", "conv"}
    assert classify("something_nobody_named") is None


def kernel(name, start, end, stream=7, correlation=-1, op=-1, **fields):
    return Event("kernel", name, start, end, f"stream {stream}", correlation, op, **fields)


def host(kind, name, start, end, lane=1, **fields):
    return Event(kind, name, start, end, lane, **fields)


# Two steps of 100 us on the host. The kernels of a step, from its start: conv 10-40 on one stream; a copy 30-50 on
# another, so that both share 30-40; silence until 60; our norm 60-80; Adam, launched in "optimizer", 85-90.
def gpu_trace():
    events = []
    for i in (0, 1):
        t = 1000.0 + 100 * i
        first = 10 * i
        events += [
            host("range", f"{STEP}{i + 1}", t, t + 100),
            host("range", "forward", t, t + 20),
            host("range", "backward", t + 20, t + 40),
            host("range", "optimizer", t + 40, t + 50),
            host("runtime", "cudaLaunchKernel", t + 1, t + 2, correlation=first + 1),
            host("runtime", "cudaMemcpyAsync", t + 3, t + 4, correlation=first + 2),
            host("runtime", "cuLaunchKernelEx", t + 21, t + 22, lane=2, correlation=first + 3),  # autograd's thread
            host("runtime", "cudaLaunchKernelExC", t + 41, t + 42, correlation=first + 4),
            host("runtime", "cudaStreamSynchronize", t + 43, t + 44),
            host("runtime", "cudaEventQuery", t + 45, t + 46),
            host("op", "fastdiff_kernels::group_norm_silu_backward", t + 20, t + 30, lane=2, op=first + 100,
                 shapes=[[2, 8, 4, 4], [2, 8, 4, 4], [8], [8]],
                 types=["c10::BFloat16", "c10::BFloat16", "float", "float"]),
            host("op", "aten::item", t + 43, t + 44),
            host("op", "aten::_local_scalar_dense", t + 43, t + 44),
            kernel("sm90_xmma_fprop_implicit_gemm_bf16bf16", t + 10, t + 40, correlation=first + 1),
            kernel("Memcpy DtoH (Device -> Pageable)", t + 30, t + 50, stream=8, correlation=first + 2, bytes=4000),
            kernel("backward_tile", t + 60, t + 79, correlation=first + 3, op=first + 100),
            kernel("backward_loop_1", t + 79, t + 80, correlation=first + 3, op=first + 100),
            kernel("void at::native::vectorized_elementwise_kernel<4, ...>", t + 85, t + 90, correlation=first + 4),
            host("memory", "[memory]", t + 5, t + 5, bytes=1000 + 500 * i, cuda=True),
            host("memory", "[memory]", t + 6, t + 6, bytes=10**9),
        ]  # fmt: skip
    t = 1200.0  # the recorder waits inside the last step: no sync of the loop's own
    events += [host("range", DRAIN, t - 5, t - 1), host("runtime", "cudaDeviceSynchronize", t - 4, t - 2)]
    # Outside of the steps: nothing of it counts.
    events += [kernel("Memset (Device)", 900, 990), host("runtime", "cudaStreamSynchronize", 990, 995)]
    return events


def test_a_gpu_trace_whose_truth_is_known():
    profile = analyse(reversed(gpu_trace()))
    assert (profile.gpu, profile.steps, profile.step) == (True, 2, 100.0)
    expected = dict.fromkeys(CATEGORIES, 0.0)
    expected |= {"conv": 25.0, "copy": 15.0, "norm": 20.0, "optimizer": 5.0, "idle": 35.0}
    assert profile.categories == pytest.approx(expected)
    assert sum(profile.categories.values()) == pytest.approx(profile.step)
    assert (profile.launches, profile.kernels, profile.syncs) == (4, 5, 1)
    assert profile.memory == 1500
    # Shares of overlapping kernels halve; their own rows show how long they ran.
    rows = {row.name: row for row in profile.rows}
    assert [row.time for row in profile.rows] == sorted((row.time for row in profile.rows), reverse=True)
    conv = rows["sm90_xmma_fprop_implicit_gemm_bf16bf16"]
    assert (conv.category, conv.calls, conv.time, conv.bytes_per_second) == ("conv", 1.0, 30.0, None)
    assert rows["Memcpy DtoH (Device -> Pageable)"].bytes_per_second == pytest.approx(4000 / 20e-6)
    inputs = {"x": torch.empty(2, 8, 4, 4, dtype=torch.bfloat16), "weight": torch.empty(8), "bias": torch.empty(8)}
    moved = REGISTRY["group_norm_silu"].min_bytes(inputs)[1]
    assert rows["backward_tile"].bytes_per_second == pytest.approx(moved / 19e-6)
    assert rows["backward_loop_1"].bytes_per_second is None
    assert profile.ranges == {"forward": (20.0, 40.0), "backward": (20.0, 20.0), "optimizer": (10.0, 5.0)}


def test_a_kernel_that_runs_over_the_end_counts_until_there():
    step = [host("range", f"{STEP}3", 0, 100), host("range", "data", 0, 100)]
    profile = analyse([*step, kernel("ema_kernel", -10, 30), kernel("forward_tile", 90, 120)])
    assert (profile.categories["optimizer"], profile.categories["norm"], profile.categories["idle"]) == (30, 10, 60)


def test_replays_of_a_graph_are_one_launch_and_many_kernels():
    events = [host("range", f"{STEP}1", 0, 100), host("runtime", "cudaGraphLaunch", 1, 2, correlation=5)]
    events += [kernel("forward_tile", 10 + i, 11 + i, correlation=5) for i in range(50)]
    profile = analyse(events)
    assert (profile.launches, profile.kernels, profile.syncs) == (1, 50, 0)
    assert profile.categories["norm"] == pytest.approx(50)


@pytest.mark.parametrize(
    ("name", "waits"),
    [
        ("cudaStreamSynchronize", True), ("cudaDeviceSynchronize", True), ("cudaEventSynchronize", True),
        ("cuStreamSynchronize", True), ("cudaMemcpy", True), ("cuMemcpyDtoH_v2", True), ("cudaMemcpyAsync", False),
        ("cuMemcpyDtoHAsync_v2", False), ("cudaMemcpy2DAsync", False), ("cudaLaunchKernel", False),
        ("cudaEventQuery", False), ("cudaStreamWaitEvent", False),
    ],
)  # fmt: skip
def test_which_calls_wait_for_the_gpu(name, waits):
    events = [host("range", f"{STEP}1", 0, 10), kernel("forward_tile", 1, 2), host("runtime", name, 3, 4)]
    assert analyse(events).syncs == waits


def test_three_streams_share_the_time_in_which_they_overlap():
    events = [kernel("a", 0, 9, 1), kernel("b", 3, 9, 2), kernel("c", 6, 9, 3), kernel("d", 20, 25, 1)]
    assert shared_time(events, 0, 22) == pytest.approx([3 + 1.5 + 1, 1.5 + 1, 1, 2])
    assert shared_time([kernel("a", 5, 5), kernel("b", 5, 6)], 0, 10) == [0, 1]


def test_self_time_is_without_the_ops_inside():
    spans = {"a": (0, 10), "b": (1, 4), "c": (2, 3), "d": (5, 9), "e": (12, 30)}
    ops = [host("op", name, *span) for name, span in spans.items()]
    times, parents = self_time(ops, end=20)
    assert times == [3, 2, 1, 4, 8]
    assert parents == [-1, 0, 1, 0, -1]


def test_parts_of_a_norm_are_the_norm_and_views_are_what_they_serve():
    ops = [
        host("op", "fastdiff_kernels::group_norm_silu", 0, 10),
        host("op", "aten::mul", 1, 5),
        host("op", "aten::linear", 10, 20),
        host("op", "aten::t", 11, 13),
        host("op", "aten::silu", 20, 30),
    ]
    profile = analyse([host("range", f"{STEP}1", 0, 40), *ops])
    found = {name: time for name, time in profile.categories.items() if time}
    assert found == {"norm": 10, "matmul": 10, "pointwise": 10, "idle": 10}
    assert (profile.gpu, profile.launches, profile.kernels, profile.syncs) == (False, 3, 5, 0)


def recorded(tmp_path, step, active=2):
    plan = schedule(wait=0, warmup=1, active=active, repeat=1)
    with profile(activities=[ProfilerActivity.CPU], schedule=plan, record_shapes=True, profile_memory=True) as profiler:
        for _ in range(active + 1):
            step()
            profiler.step()
    path = tmp_path / "trace.json.gz"
    profiler.export_chrome_trace(str(path))
    return read_trace(path)


def test_a_real_cpu_trace_adds_up(tmp_path):
    x = torch.randn(4, 8, 16, 16, requires_grad=True)
    w = torch.randn(8, 8, 3, 3, requires_grad=True)

    def step():
        with record_function("forward"):
            loss = F.silu(F.group_norm(F.conv2d(x, w, padding=1), 4)).mean()
        with record_function("backward"):
            grads = torch.autograd.grad(loss, [x, w])
        with record_function("optimizer"):
            w.detach().add_(grads[1], alpha=-1e-3)
        loss.item()

    found = analyse(recorded(tmp_path, step))
    assert (found.gpu, found.steps, found.syncs) == (False, 2, 1)
    assert sum(found.categories.values()) == pytest.approx(found.step)
    assert all(found.categories[name] > 0 for name in ("conv", "norm", "pointwise", "optimizer", "idle"))
    assert sum(row.time for row in found.rows) == pytest.approx(found.step - found.categories["idle"])
    assert found.ranges.keys() == {"forward", "backward", "optimizer"}
    assert all(0 < own <= wall < found.step for wall, own in found.ranges.values())
    # The convolution's output at the least is alive at some moment of a step.
    assert found.memory is not None
    assert found.memory >= x.nbytes


def test_bytes_of_our_ops_are_their_specs(tmp_path):
    x = torch.randn(2, 16, 8, 8).to(memory_format=torch.channels_last).requires_grad_()
    weight, bias = torch.ones(16), torch.zeros(16)
    n = 1000
    state = [torch.zeros(n) for _ in range(5)]
    scalars = {k: torch.tensor(1.0, dtype=torch.float64) for k in ("step", "lr", "decay", "clip")}

    def step():
        group_norm_silu(x, weight, bias, 4).sum().backward()
        add_group_norm_silu(x, weight, bias, 4)[0].sum().backward()
        adam_ema_(*state, None, **scalars)
        F.silu(x.detach())

    events = recorded(tmp_path, step, active=1)
    moved = {e.name: op_bytes(e) for e in events if e.kind == "op"}
    assert moved["fastdiff_kernels::add_group_norm_silu"] == 3 * x.nbytes + 2 * 4 * 16
    assert moved["fastdiff_kernels::add_group_norm_silu_backward"] == 5 * x.nbytes + 4 * 4 * 16
    forward, backward = REGISTRY["group_norm_silu"].min_bytes({"x": x.detach(), "weight": weight, "bias": bias})
    assert moved["fastdiff_kernels::group_norm_silu"] == forward
    assert moved["fastdiff_kernels::group_norm_silu_backward"] == backward
    assert moved["fastdiff_kernels::adam_ema_"] == 4 * n * (2 * 4 + 1)
    assert moved["aten::silu"] == 2 * x.nbytes


def test_bytes_of_a_triton_kernel_are_those_of_its_arguments():
    op = host(
        "op", "triton_poi_fused_add_0", 0, 1, shapes=[[4, 8], [8], []], types=["c10::BFloat16", "float", "Scalar"]
    )
    assert op_bytes(op) == 4 * 8 * 2 + 8 * 4
    assert op_bytes(host("op", "aten::mkldnn_convolution", 0, 1, shapes=[[4, 8]], types=["float"])) is None
    assert op_bytes(host("op", "aten::silu", 0, 1)) is None


def test_files_that_are_no_trace_are_one_line(tmp_path):
    for name, data in {"a.json": b"{}", "b.json.gz": b"no gzip", "c.json.gz": gzip.compress(b"[1")}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=name):
            read_trace(tmp_path / name)
    with pytest.raises(UserError, match="nowhere"):
        read_trace(tmp_path / "nowhere.json")
    empty = tmp_path / "empty.json"
    empty.write_text(json.dumps({"traceEvents": []}))
    with pytest.raises(UserError, match="no step"):
        analyse(read_trace(empty))


def made(gpu=True, syncs=0.0, **shares):
    categories = dict.fromkeys(CATEGORIES, 0.0) | {name: 1000 * share for name, share in shares.items()}
    return Profile(gpu, 5, 1000.0, categories, [], {}, 300.0, 400.0, syncs, None)


@pytest.mark.parametrize(
    ("profile", "said"),
    [
        (made(conv=0.5, norm=0.4, idle=0.1), "conv is the largest part with 50%"),
        (made(conv=0.3, norm=0.6, idle=0.1), "norm is the largest part with 60%"),
        (made(conv=0.6, idle=0.4, syncs=2), "idle for 40% (host syncs a step: 2): take those out"),
        (made(conv=0.6, idle=0.4), "capture the step in a CUDA graph"),
        (made(conv=0.6, idle=0.4, gpu=False), "40% of the step is outside of all ops"),
        (made(conv=1 - IDLE_LIMIT, idle=IDLE_LIMIT), "conv is the largest"),
    ],
)
def test_the_next_step_follows_the_rule(profile, said):
    assert said in next_step(profile)


def test_the_report_holds_the_figures(tmp_path):
    profile = analyse(gpu_trace())
    write_report(
        tmp_path, profile, title="A step", plain_step=0.0815, facts={"device": "X"}, memory=("gpu allocated", 2**20)
    )
    text = (tmp_path / "summary.md").read_text()
    for part in (
        "# A step", "- device: X", "**0.0815 ms** without the profiler and 0.1 ms with it", "| idle | 0.035 | 35.0% |",
        "| conv | 0.025 | 25.0% |", "4.0 calls, 5.0 kernels", "host syncs a step: 1", "gpu allocated: 1.0 MiB",
        "| optimizer | 0.010 | 0.005 |", "**Next:** the GPU is idle for 35%",
    ):  # fmt: skip
        assert part in text
    assert (tmp_path / "time.png").read_bytes()[:4] == b"\x89PNG"
