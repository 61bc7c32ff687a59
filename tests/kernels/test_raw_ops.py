"""Every raw operator under attack: one argument at a time is wrong, and the sentence that refuses it names it.

One file, for real and fake tensors get the same right call and the same wrong ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from advflow_ext import _native
from advflow_ext._native import STATS

pytestmark = [
    pytest.mark.skipif(_native.module is None, reason="nothing compiled"),
    pytest.mark.usefixtures("poisoned_memory"),
]

B = 3  # samples of [2, 5]

Arguments = dict[str, Any]


def latent(seed: int = 0) -> Tensor:
    return torch.randn(B, 2, 5, generator=torch.Generator().manual_seed(seed))


def column() -> Tensor:
    return torch.linspace(-1, 1, B)


LATENTS = {
    "forward_loss": ("v", "x0", "noise", "v_old", "v_ref"),
    "reverse_loss": ("v", "eps", "v_old", "v_ref"),
    "residual": ("v", "target", "noise", "v_old", "v_ref"),
    "transition": ("v", "eps", "v_old", "v_ref"),
}
LOSSES = {"forward_loss": ("advantage_flow", 3, [0, 0]), "reverse_loss": ("flow_grpo", 4, [1, 0, 0])}
REQUIRED = {"residual": ("v", "target"), "transition": ("v", "eps", "v_old")}


def right_call(op: str) -> Arguments:
    """Arguments the operator takes, every optional tensor among them."""
    if op == "loss_summary":
        return {
            "means": [column(), column()],
            "required": [column()],
            "advantages": column(),
            "extreme": column(),
            "stats": torch.ones(B, len(STATS)),
            "coef": torch.ones(B, 3),
            "valid": torch.ones(B, dtype=torch.bool),
            "flagged": torch.zeros(B, dtype=torch.bool),
            "stat_means": 3,
            "largest": False,
            "reduction": "mean",
            "log_ratio": column(),
            "log_lowest": column(),
            "log_highest": column(),
            "v": latent(),
            "contrast": True,
        }
    if op in LOSSES:
        drawn = {"t": torch.linspace(0.2, 1, B)}
        if op == "reverse_loss":
            drawn = {"index": torch.arange(B), "steps": torch.full((B + 2, 5), 0.5)}
        name, numbers, choices = LOSSES[op]
        return {
            "name": name,
            **{key: latent(seed) for seed, key in enumerate(LATENTS[op])},
            **drawn,
            "advantages": column(),
            "numbers": [0.0] * numbers,
            "tensors": [torch.linspace(0.3, 0.9, B) for _ in range(numbers)],
            "choices": choices,
            "reduction": "mean",
        }
    if op.startswith("sde_step"):
        noise, seed = (None, torch.arange(B)) if op == "sde_step drawn" else (latent(2), None)
        return {"v": latent(), "x": latent(1), "coef": torch.ones(B, 3), "noise": noise, "seed": seed}
    if op.startswith("transition_deviation"):
        given_: Arguments = {"v": latent(), "x": latent(1), "x_next": latent(2), "coef": torch.ones(B, 3)}
        return given_ if op == "transition_deviation_sq" else given_ | {"weight": column()}
    family = op.split("_")[0]
    arguments: Arguments = {name: latent(seed) for seed, name in enumerate(LATENTS[family])}
    if op == "residual_stats":
        arguments["mixes"] = column()
    if op.endswith("grad"):
        arguments |= {"coef": torch.ones(B, 3), "upstream": column()}
    return arguments


OPS = ("residual_stats", "residual_grad", "transition_stats", "transition_grad", "loss_summary")
CALLS = (*OPS, *LOSSES, "sde_step given", "sde_step drawn", "transition_deviation_sq", "transition_deviation")


def call(op: str, arguments: Arguments) -> Any:
    return getattr(torch.ops.advflow, op.split()[0]).default(**arguments)


def tensors_of(arguments: Arguments) -> list[str]:
    """Names of all tensor arguments, elements of a list by their place."""
    names = [name for name, value in arguments.items() if isinstance(value, Tensor)]
    lists = [(name, value) for name, value in arguments.items() if isinstance(value, list)]
    return names + [f"{name}[{k}]" for name, value in lists for k, x in enumerate(value) if isinstance(x, Tensor)]


def replaced(arguments: Arguments, name: str, change: Callable[[Tensor], Any]) -> Arguments:
    key, _, place = name.partition("[")
    if not place:
        return arguments | {key: change(arguments[key])}
    columns = list(arguments[key])
    columns[int(place[:-1])] = change(columns[int(place[:-1])])
    return arguments | {key: columns}


# What no argument may be, whatever it is.
WRONG_DTYPES = (torch.int32, torch.uint8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn)
LATENT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
WRONG_SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "a sample less": lambda x: x[:-1],
    "a sample more": lambda x: torch.cat([x, x[:1]]),
    "a dimension more": lambda x: x[..., None],
    "a dimension less": lambda x: x.flatten()[:B] if x.dim() > 1 else x[0].reshape(1, 1),
    "a row less": lambda x: x[..., :-1],
    "empty": lambda x: x[:0],
    "one for all": lambda x: x[:1],
}
OTHER_LAYOUTS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "sparse": (lambda x: x.to_sparse(), "has layout Sparse; accepted is Strided"),
    "mkldnn": (lambda x: x.float().to_mkldnn(), "has layout Mkldnn; accepted is Strided"),
    "quantized": (lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8), "has dtype QInt8; accepted"),
    "nested": (lambda x: torch.nested.nested_tensor(list(x)), "is a nested tensor; accepted is one of strided layout"),
    "elsewhere": (lambda x: x.to("meta"), r"is on meta; accepted is the device of (v|stats), cpu"),
}


def refused(op: str, arguments: Arguments, sentence: str) -> None:
    module = _native.module
    assert module is not None
    module.reset_launch_count()
    with pytest.raises(RuntimeError, match=sentence) as raised:
        call(op, arguments)
    assert str(raised.value).splitlines()[0].endswith("."), raised.value
    assert module.launch_count() == 0


def literal(name: str) -> str:
    return "^" + name.replace("[", r"\[").replace("]", r"\]") + " "


@pytest.mark.parametrize("op", CALLS)
def test_the_right_call_is_right(op):
    results = call(op, right_call(op))
    for result in results if isinstance(results, tuple) else (results,):
        assert result.isfinite().all()


@given(st.data(), st.sampled_from(CALLS))
@settings(max_examples=300)
def test_one_wrong_dtype(data, op):
    arguments = right_call(op)
    name = data.draw(st.sampled_from(tensors_of(arguments)))
    key = name.split("[")[0]
    # Halves of a column, a table or a coefficient are as wrong as integers; of a latent they are right.
    is_latent = key in ("v", "target", "x0", "noise", "v_old", "v_ref", "eps", "x", "x_next")
    is_latent |= op in LOSSES and key in ("t", "advantages", "tensors")  # no latent, but read in any dtype too
    wrong = [*WRONG_DTYPES, *(() if is_latent else LATENT_DTYPES)]
    before = replaced(arguments, name, lambda x: x)
    current = (before[key][0] if isinstance(before[key], list) else before[key]).dtype
    dtype = data.draw(st.sampled_from([d for d in wrong if d != current]))
    if op == "loss_summary" and key == "stats" and dtype == torch.float64:
        return  # a right dtype, and then everything else is wrong
    refused(op, replaced(arguments, name, lambda x: x.to(dtype)), literal(name) + "has dtype")


@given(st.data(), st.sampled_from(CALLS), st.sampled_from(sorted(WRONG_SHAPES)))
@settings(max_examples=300)
def test_one_wrong_shape(data, op, how):
    arguments = right_call(op)
    # v and stats are what the others are measured by, a table of steps is as long as it is.
    name = data.draw(st.sampled_from([n for n in tensors_of(arguments) if n not in ("v", "stats", "steps")]))
    wrong = replaced(arguments, name, WRONG_SHAPES[how])
    refused(op, wrong, literal(name) + r"has shape \[")


@pytest.mark.parametrize("how", OTHER_LAYOUTS)
@pytest.mark.parametrize("op", CALLS)
def test_one_tensor_of_another_kind(op, how):
    change, sentence = OTHER_LAYOUTS[how]
    arguments = right_call(op)
    for name in tensors_of(arguments):
        key = name.split("[")[0]
        if how == "elsewhere" and key == ("stats" if op == "loss_summary" else "v"):
            # Then every other tensor is elsewhere, and the first of those is named.
            with pytest.raises(RuntimeError, match=r"is on cpu; accepted is the device of (v|stats), meta"):
                call(op, replaced(arguments, name, change))
            continue
        refused(op, replaced(arguments, name, change), literal(name) + sentence)


@pytest.mark.parametrize("op", CALLS)
def test_one_tensor_is_none(op):
    arguments = right_call(op)
    optional = {
        "noise",
        "v_ref",
        "upstream",
        "seed",
        "mixes",
        "weight",
        *(("v_old",) if op.startswith("residual") else ()),
    }
    if op in LOSSES:
        optional = {"v_ref", "v_old"} if op == "forward_loss" else {"v_ref"}
    if op == "loss_summary":
        optional = {"log_ratio", "log_lowest", "log_highest", "v"}
    for name in tensors_of(arguments):
        if name not in optional and "[" not in name:  # PyTorch itself lets no None into a list
            refused(op, replaced(arguments, name, lambda _: None), literal(name) + "is None; accepted is a tensor")


@pytest.mark.parametrize("bound", ["log_lowest", "log_highest"])
def test_a_bound_without_its_ratio_is_refused(bound):
    arguments = {**right_call("loss_summary"), "log_ratio": None, "log_lowest": None, "log_highest": None}
    refused("loss_summary", arguments | {bound: column()}, f"{bound} is given without log_ratio; accepted")


def test_a_mix_of_each_row_is_that_row_s():
    arguments = right_call("residual_stats")
    mixes = torch.tensor([0.5, 0.0, 2.0])
    rows = [call("residual_stats", {**arguments, "mixes": None, "mix": float(mix)})[k] for k, mix in enumerate(mixes)]
    assert torch.equal(call("residual_stats", arguments | {"mixes": mixes}), torch.stack(rows))
    assert torch.equal(
        call("residual_stats", arguments | {"mixes": torch.tensor(0.5)}),
        call("residual_stats", {**arguments, "mixes": None, "mix": 0.5}),
    )


@pytest.mark.parametrize("dtype", LATENT_DTYPES)
@pytest.mark.parametrize("op", ["residual_grad", "transition_grad", "sde_step given", "transition_deviation"])
def test_one_latent_decides_what_is_accumulated_in(op, dtype):
    """float64 anywhere asks for float64 coefficients; anything else keeps them float32."""
    arguments = right_call(op)
    for name in [n for n in tensors_of(arguments) if arguments[n].dim() == 3]:
        mixed = replaced(arguments, name, lambda x: x.to(dtype))
        if dtype == torch.float64:
            refused(op, mixed, r"^coef has dtype Float; accepted is the accumulate type of the inputs, Double")
            wide = {key: mixed[key].double() for key in ("coef", "upstream", "weight") if mixed.get(key) is not None}
            call(op, mixed | wide)
        else:
            call(op, mixed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_table_of_statistics_is_refused(dtype):
    # Everything in one dtype, so that only the table's own check can see it.
    given_ = {
        name: [c.to(dtype) for c in value]
        if isinstance(value, list)
        else value.to(dtype)
        if isinstance(value, Tensor) and value.dtype.is_floating_point
        else value
        for name, value in right_call("loss_summary").items()
    }
    for reduction in ("mean", "sum", "none"):
        sentence = rf"^stats has dtype {'Half' if dtype == torch.float16 else 'BFloat16'}; accepted are float32 and flo"
        refused("loss_summary", given_ | {"reduction": reduction}, sentence)


@pytest.mark.parametrize("op", ["residual_stats", "sde_step given"])
def test_a_batch_needs_a_dimension(op):
    arguments = {k: v[0, 0, 0] if isinstance(v, Tensor) and v.dim() == 3 else v for k, v in right_call(op).items()}
    refused(op, arguments, r"^v has no dimension; accepted is a batch of samples")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"noise": None}, r"^Neither of noise and seed given; accepted is exactly one"),
        ({"seed": torch.arange(B)}, r"^Both of noise and seed given; accepted is exactly one"),
        ({"dtype": torch.int32}, r"^dtype is Int; accepted are float32"),
        ({"dtype": torch.complex64}, r"^dtype is ComplexFloat; accepted are float32"),
    ],
)
def test_options_of_a_step(change, sentence):
    refused("sde_step", right_call("sde_step given") | change, sentence)


LOSS_OPTIONS: list[tuple[Arguments, str]] = [
    ({"reduction": "avg"}, r"^reduction is 'avg'; accepted are 'mean', 'sum' and 'none'"),
    ({"choices": [0]}, r"^choices has 1 values; accepted are "),
    ({"numbers": [1.0]}, r"^numbers has 1 values; accepted are "),
    ({"tensors": [None]}, r"^tensors has 1 values; accepted are "),
]


@pytest.mark.parametrize(
    ("op", "change", "sentence"),
    [
        *[(op, *case) for op in LOSSES for case in LOSS_OPTIONS],
        (
            "forward_loss",
            {"name": "flow_grpo"},
            r"^name is 'flow_grpo'; accepted are 'advantage_flow', 'diffusion",
        ),
        ("reverse_loss", {"name": "awm"}, r"^name is 'awm'; accepted are 'flow_grpo', 'flow_dppo'"),
        ("forward_loss", {"choices": [0, 3]}, r"^choices\[1\] is 3; accepted are 0 to 2"),
        ("reverse_loss", {"choices": [-1, 0, 0]}, r"^choices\[0\] is -1; accepted are 0 to 3"),
        ("reverse_loss", {"steps": torch.ones(5, 4)}, r"^steps has shape \[5, 4\]; accepted is \[steps \+ 2, 5\]"),
        ("reverse_loss", {"steps": torch.ones(0, 5)}, r"^steps has shape \[0, 5\]; accepted is \[steps \+ 2, 5\]"),
    ],
)
def test_options_of_a_loss(op, change, sentence):
    arguments = right_call(op) | change
    refused(op, arguments, sentence)
    with torch._subclasses.FakeTensorMode(), pytest.raises(RuntimeError, match=sentence):
        call(op, faked(arguments))


@pytest.mark.parametrize("op", LOSSES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck_of_a_loss(op, reduction):
    arguments = right_call(op) | {"reduction": reduction}
    arguments["v"].requires_grad_()
    torch.library.opcheck(getattr(torch.ops.advflow, op).default, (), arguments)


@pytest.mark.parametrize("op", LOSSES)
def test_a_loss_takes_numbers_and_tensors_of_them(op):
    arguments = right_call(op)
    count = len(arguments["numbers"])
    numbers = arguments | {"numbers": [0.5] * count, "tensors": [None] * count}
    expected = call(op, numbers)
    for tensor in (torch.tensor(0.5), torch.tensor(0.5).half(), torch.full((B,), 0.5).bfloat16(), column() * 0 + 0.5):
        assert same(call(op, arguments | {"tensors": [tensor] * count}), expected)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"means": []}, r"^means is empty"),
        ({"means": [column()] * 9}, r"^means has 9 columns; accepted are at most 8"),
        ({"required": [column()] * 5}, r"^required has 5 columns; accepted are at most 4"),
        ({"stat_means": 4}, r"^stat_means is 4; accepted are 0 to 3"),
        ({"stat_means": -1}, r"^stat_means is -1; accepted are 0 to 3"),
        ({"stat_means": 2**32}, r"^stat_means is 4294967296; accepted are 0 to 3"),
        ({"reduction": ""}, r"^reduction is ''; accepted are 'mean', 'sum' and 'none'"),
        ({"reduction": "means"}, r"^reduction is 'means'; accepted are"),
        ({"stats": torch.ones(B, 7)}, r"^stats has shape \[3, 7\]; accepted is \[B, 8\]"),
        ({"stats": torch.ones(B * len(STATS))}, r"^stats has shape \[24\]; accepted is \[B, 8\]"),
    ],
)
def test_options_of_a_summary(change, sentence):
    refused("loss_summary", right_call("loss_summary") | change, sentence)


# ---------------------------------------------------------------------------------------------------------------------
# Views that are not what their memory says


def same(one: Any, other: Any) -> bool:
    pairs = zip(one, other, strict=True) if isinstance(one, tuple) else [(one, other)]
    return all(torch.equal(a, b) for a, b in pairs)


def negative_view(tensor: Tensor) -> Tensor:
    view = torch.complex(torch.zeros_like(tensor), -tensor).conj().imag
    assert view.is_neg() and torch.equal(view, tensor)
    return view


def off_its_elements(tensor: Tensor) -> Tensor:
    """The same numbers at an address that is no multiple of their size, as torch.frombuffer may give it."""
    data = bytearray(1 + tensor.numel() * tensor.element_size())
    view = torch.frombuffer(data, dtype=tensor.dtype, offset=1).view(tensor.shape)
    assert view.data_ptr() % tensor.element_size()
    return view.copy_(tensor)


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("view", [negative_view, off_its_elements])
def test_a_view_counts_by_its_values(op, view):
    arguments = right_call(op)
    expected = call(op, arguments)
    for name in tensors_of(arguments):
        if name not in ("valid", "flagged", "seed", "index"):
            assert same(call(op, replaced(arguments, name, view)), expected), name


def test_a_seed_may_lie_anywhere():
    arguments = right_call("sde_step drawn")
    expected = call("sde_step", arguments)
    for view in (off_its_elements, lambda x: torch.stack([x, x], 1)[:, 1]):
        assert same(call("sde_step", arguments | {"seed": view(arguments["seed"])}), expected)


def test_a_flag_is_any_byte_but_zero():
    arguments = right_call("loss_summary")
    flags = torch.tensor([0, 2, 255], dtype=torch.uint8)
    truth = {"valid": flags != 0, "flagged": flags != 0}
    raw = {name: flags.view(torch.bool) for name in truth}
    assert same(call("loss_summary", arguments | raw), call("loss_summary", arguments | truth))


# ---------------------------------------------------------------------------------------------------------------------
# The fakes


def faked(arguments: Arguments, device: str = "cpu") -> Arguments:
    def of(value: Any) -> Any:
        if isinstance(value, list):
            return [of(item) for item in value]
        if not isinstance(value, Tensor):
            return value
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)

    return {name: of(value) for name, value in arguments.items()}


@pytest.mark.parametrize("op", CALLS)
def test_a_fake_gives_the_same_shapes_and_dtypes(op):
    for change in (lambda x: x, lambda x: x.double()):
        arguments = right_call(op)
        for name in tensors_of(arguments):
            arguments = replaced(arguments, name, lambda x: change(x) if x.is_floating_point() else x)  # noqa: B023
        real = call(op, arguments)
        with torch._subclasses.FakeTensorMode():
            fake = call(op, faked(arguments))
        pairs = zip(real, fake, strict=True) if isinstance(real, tuple) else [(real, fake)]
        for a, b in pairs:
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


@given(st.data(), st.sampled_from(CALLS), st.booleans())
@settings(max_examples=200)
def test_a_fake_refuses_what_the_kernel_refuses(data, op, of_dtype):
    arguments = right_call(op)
    name = data.draw(st.sampled_from([n for n in tensors_of(arguments) if n not in ("v", "stats", "steps")]))
    if of_dtype:
        change = lambda x: x.to(torch.int32)  # noqa: E731
    else:
        change = WRONG_SHAPES[data.draw(st.sampled_from(sorted(WRONG_SHAPES)))]
    wrong = replaced(arguments, name, change)
    sentence = literal(name) + ("has dtype" if of_dtype else r"has shape \[")
    refused(op, wrong, sentence)
    with torch._subclasses.FakeTensorMode(), pytest.raises(RuntimeError, match=sentence):
        call(op, faked(wrong))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int32])
def test_a_fake_of_half_statistics_is_refused(dtype):
    arguments = right_call("loss_summary")
    for name in tensors_of(arguments):
        arguments = replaced(arguments, name, lambda x: x.to(dtype) if x.is_floating_point() else x)
    with (
        torch._subclasses.FakeTensorMode(),
        pytest.raises(RuntimeError, match=r"^stats has dtype torch\.\w+; acc"),
    ):
        call("loss_summary", faked(arguments))


@pytest.mark.parametrize("op", CALLS)
def test_fakes_know_what_cuda_serves(op):
    """Mixed devices and float64 are refused before there is a GPU."""
    arguments = right_call(op)
    with torch._subclasses.FakeTensorMode():
        fakes = faked(arguments, "cuda")
        results = call(op, fakes)
        for result in results if isinstance(results, tuple) else (results,):
            assert result.device.type == "cuda"
        wide = fakes
        for name in tensors_of(arguments):
            wide = replaced(wide, name, lambda x: x.double() if x.is_floating_point() else x)
        with pytest.raises(RuntimeError, match=rf"^{op.split()[0]} received float64 on CUDA; accepted there are"):
            call(op, wide)
        for name in tensors_of(arguments):
            if name not in ("v", "stats"):
                with pytest.raises(RuntimeError, match=literal(name) + "is on cpu; accepted is the device of"):
                    call(op, replaced(fakes, name, lambda x: torch.empty(x.shape, dtype=x.dtype)))
