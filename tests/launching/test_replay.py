# SPDX-License-Identifier: MIT
"""Which launches and calls are repeated, and with what: a driver that only records stands in for the GPU's.

The tensors that a repeated call makes but does not return lie side by side in one block.
"""

import copy
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="launching needs the extra `triton`")

from fake_launches import Launches

from dpb_triton.launching import launch as launching
from dpb_triton.launching import replay


@pytest.fixture
def gpu(monkeypatch):
    yield Launches(monkeypatch)
    replay.forget()


X = torch.zeros(64)
USUAL = {
    "x": X,
    "pair": (None, X),
    "number": 3,
    "plain": 3,
    "scale": 0.5,
    "IS_SET": False,
    "WIDTH": 16,
    "num_warps": 4,
    "grid": (3, 2),
}
BY_PLACE = ("x", "pair", "number", "plain", "scale")


def start(gpu, **changes):
    call = USUAL | changes
    args = [call.pop(name) for name in BY_PLACE]
    return launching.launch(gpu.kernel, call.pop("grid"), *args, **call)


def test_a_known_kind_is_started_directly(gpu):
    compiled, arguments = start(gpu)
    assert (
        gpu.by_triton == [((3, 2), (X, (None, X), 3, 3, 0.5), {"IS_SET": False, "WIDTH": 16, "num_warps": 4})]
        and not gpu.started
    )
    other, at = X[16:48], X.data_ptr()
    gpu.stream = 9
    assert start(gpu, x=other, plain=48, scale=2.5, grid=(5,))[0] is compiled
    assert arguments == [X, (None, X), 3, 3, 0.5, 16, False] and len(gpu.by_triton) == 1
    numbers = other.data_ptr(), (None, at), 3, 48, 2.5, 16, False
    assert gpu.started == [(5, 1, 1, (0, 9), "function", "metadata", None, None, None, *numbers)]


KINDS = {
    "dtype": {"x": X.half()}, "alignment": {"x": X[2:]}, "alignment in a tuple": {"pair": (None, X[2:])},
    "absent": {"pair": (X, None)}, "one": {"number": 1}, "divisible": {"number": 32}, "64 bits": {"number": 2**31},
    "negative 64 bits": {"number": -(2**31) - 1}, "64 bits, not specialised": {"plain": 2**31},
    "type": {"plain": 3.0}, "constant": {"WIDTH": 32}, "constant's type": {"IS_SET": 0}, "option": {"num_warps": 8},
    "another option": {"num_stages": 1}, "specialised in a tuple": {"plain": (1, 3)},
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_another_kind_is_left_to_triton_once(name, gpu):
    start(gpu, plain=(3, 3) if name == "specialised in a tuple" else 3)
    for count in (0, 1):
        start(gpu, **KINDS[name])
        assert (len(gpu.by_triton), len(gpu.started)) == (2, count)


@pytest.mark.parametrize("change", [{"plain": 2**31 - 1}, {"plain": -(2**31)}, {"number": 8}, {"number": 0}], ids=str)
def test_numbers_that_are_no_kind_of_their_own(change, gpu):
    start(gpu, number=16 if change == {"number": 0} else 3, plain=5)
    start(gpu, **change)
    assert len(gpu.by_triton) == 1


def test_a_call_without_an_int_is_started_directly(gpu):
    for scale in (1.5, 2.5):
        start(gpu, number=0.5, plain=0.5, scale=scale)
    assert len(gpu.by_triton) == len(gpu.started) == 1


def test_which_of_the_numbers_need_64_bits(gpu):
    for plain, count in ((-(2**31), 1), (-(2**31) - 1, 2), (2**31 - 1, 2), (2**31, 2)):
        start(gpu, number=2**31, plain=plain)
        assert len(gpu.by_triton) == count, plain


def test_a_kernel_that_still_compiles_is_left_to_triton(gpu):
    gpu.is_ready = False
    assert [start(gpu) for _ in range(2)] == [(None, None)] * 2
    gpu.is_ready = True
    start(gpu)
    start(gpu)
    assert len(gpu.by_triton) == 3 and len(gpu.started) == 1


ARGUMENTS = tuple(USUAL[name] for name in BY_PLACE)
CONSTANTS = {name: USUAL[name] for name in ("WIDTH", "IS_SET")}
UNKNOWN = {
    "a constant by its place": ((*ARGUMENTS, 16), {"IS_SET": False}),
    "an argument by its name": (ARGUMENTS[:4], CONSTANTS | {"scale": 0.5}),
    "an argument twice": (ARGUMENTS, CONSTANTS | {"number": 3}),
    "a default": (ARGUMENTS, {"WIDTH": 16}),
    "too many": ((*ARGUMENTS, 16, False, 3), {}),
    "a bool": ((*ARGUMENTS[:3], True, 0.5), CONSTANTS),
    "a string": ((*ARGUMENTS[:3], "3", 0.5), CONSTANTS),
    "numbers beside tensors": ((X, (3, X), *ARGUMENTS[2:]), CONSTANTS),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_call_of_unknown_form_is_left_to_triton(name, gpu):
    args, constants = UNKNOWN[name]
    for _ in range(2):
        assert launching.launch(gpu.kernel, (3,), *args, **constants)[1] is None
    assert gpu.by_triton == [((3,), args, constants)] * 2 and not gpu.started


def test_a_tuple_is_not_taken_for_its_neighbour(gpu):
    """Both calls hold the same tensors and None in the same order."""
    start(gpu)
    start(gpu, x=(X, None), pair=X)
    assert len(gpu.by_triton) == 2 and gpu.by_triton[1][1][:2] == ((X, None), X)


def test_options_are_told_apart_by_their_names(gpu):
    for count, option in enumerate(("num_warps", "num_stages", "num_ctas"), 1):
        launching.launch(gpu.kernel, (3,), *ARGUMENTS, **CONSTANTS, **{option: 2})
        assert len(gpu.by_triton) == count and option in gpu.by_triton[-1][2]


def test_each_kernel_has_its_own_binaries(gpu):
    start(gpu)
    first, gpu.kernel = gpu.kernel, gpu.another_kernel()
    compiled, _ = start(gpu)
    assert len(gpu.by_triton) == 2 and not gpu.started
    assert start(gpu)[0] is compiled
    gpu.kernel = first
    assert start(gpu)[0] is not compiled and len(gpu.by_triton) == 2


def test_a_kernel_of_another_class_is_left_to_triton(gpu):
    """As `triton.autotune` makes."""
    called = []

    class Tuned:
        def __getitem__(self, grid):
            return lambda *args, **constants: called.append((grid, args, constants))

    assert launching.launch(Tuned(), (3,), X, WIDTH=16) == (None, None)
    assert called == [((3,), (X,), {"WIDTH": 16})]


def test_another_driver_has_its_own_binaries_targets_and_tapes(gpu, monkeypatch):
    call = call_of(gpu)
    for _ in range(3):
        call(X, 3)
    start(gpu)
    launching.current_target()
    gpu.by_triton.clear()
    other = copy.copy(gpu)
    other.get_current_target = lambda: "another target"
    for module in (launching, replay):
        monkeypatch.setattr(module, "driver", SimpleNamespace(active=other))
    assert launching.current_target() == "another target"
    call(X, 3)
    start(gpu)
    assert len(call.ran) == 3 and len(gpu.by_triton) == 3


def test_rounding_up():
    assert [launching.cdiv(x, 4) for x in (0, 1, 4, 5, 8)] == [0, 1, 1, 2, 2]
    assert [launching.next_power_of_2(x) for x in (1, 2, 3, 4, 5, 64, 65)] == [1, 2, 4, 4, 8, 64, 128]


def test_another_device_has_its_own_binaries_and_target(gpu):
    start(gpu)
    assert launching.current_target().arch == 80
    gpu.device = 1
    start(gpu)
    assert len(gpu.by_triton) == 2 and not gpu.started
    start(gpu)
    assert gpu.started[0][3] == (1, 7)
    assert launching.current_target().arch == 90
    assert launching.current_target() is launching.current_target()


def call_of(gpu, also=lambda *args: None, hide=replay.empty, make=replay.empty):
    """A repeated function that makes a tensor, launches with it, and returns another one; `.ran` lists its runs."""
    ran = []

    @replay.repeated(also)
    def call(x, number, **options):
        ran.append(number)
        hidden, made = hide((5,), torch.float32, x.device), make(x.shape, x.dtype, x.device)
        replay.launch(gpu.kernel, (number,), x, (None, hidden), number, 3, 0.5, WIDTH=16, IS_SET=True)
        replay.launch(gpu.kernel, (1,), x, (hidden, made if make is replay.empty else None), number, 3, 0.5, WIDTH=16,
                      IS_SET=True)  # fmt: skip
        return made

    call.ran = ran
    return call


def test_the_third_call_repeats_the_second(gpu):
    call, gpu.device = call_of(gpu), 1
    for _ in range(2):
        call(X, 3)
    gpu.started.clear()
    gpu.stream, other = 9, X.clone()
    results = [call(other, 3), call(other, 3)]
    assert call.ran == [3, 3] and len(gpu.by_triton) == 2
    assert [(result.shape, result.dtype) for result in results] == [(X.shape, X.dtype)] * 2
    assert results[0].data_ptr() != results[1].data_ptr()
    for (first, second), result in zip((gpu.started[:2], gpu.started[2:]), results, strict=True):
        assert first[:4] == (3, 1, 1, (1, 9)) and second[:4] == (1, 1, 1, (1, 9))
        hidden = first[10][1]
        assert first[9:] == (other.data_ptr(), (None, hidden), 3, 3, 0.5, 16, True)
        assert second[9:] == (other.data_ptr(), (hidden, result.data_ptr()), 3, 3, 0.5, 16, True)


OTHERS = {
    "sizes": lambda: (X[:32], 3), "strides": lambda: (X[:64:2], 3), "dtype": lambda: (X[:32].int(), 3),
    "alignment": lambda: (X[2:34], 3), "number": lambda: (X[:32], 4), "type of a number": lambda: (X[:32], 3.0),
}  # fmt: skip


@pytest.mark.parametrize("name", [*OTHERS, "device", "setting"])
def test_another_call_is_not_repeated(name, gpu):
    setting = [0]
    call = call_of(gpu, also=lambda *args: setting[0])
    for _ in range(3):
        call(X[:32], 3)
    gpu.device, setting[0] = int(name == "device"), int(name == "setting")
    args = OTHERS.get(name, lambda: (X[:32], 3))()
    if name == "sizes":
        args = X[:16], 3
    for count in (3, 4, 4):
        call(*args)
        assert len(call.ran) == count


def by_torch(size, dtype, device):
    return torch.empty(size, dtype=dtype, device=device)


@pytest.mark.parametrize("makes", [{"hide": by_torch}, {"make": by_torch}], ids=["launch", "result"])
def test_a_call_with_a_tensor_of_another_origin_is_never_repeated(makes, gpu):
    call = call_of(gpu, **makes)
    for _ in range(4):
        call(X, 3)
    assert len(call.ran) == 4


def test_a_call_that_launches_nothing_is_never_repeated(gpu):
    """Something else wrote its result, as zeros for a call without keys."""
    ran = []

    @replay.repeated()
    def call(x):
        ran.append(x)
        return replay.empty((5,), torch.float32, x.device).zero_()

    for _ in range(4):
        assert not call(X).any()
    assert len(ran) == 4


def test_a_call_whose_launches_are_not_all_known_is_never_repeated(gpu):
    ran = []

    @replay.repeated()
    def call(x):
        ran.append(x)
        made = replay.empty((5,), torch.float32, x.device)
        for plain in (3, "a word"):  # the launcher leaves the second one to Triton
            replay.launch(gpu.kernel, (1,), x, (None, made), 3, plain, 0.5, WIDTH=16, IS_SET=True)
        return made

    for _ in range(4):
        call(X)
    assert len(ran) == 4


def test_a_call_with_a_misaligned_allocation_is_never_repeated(gpu, monkeypatch):
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda size, **options: empty(size[0] + 2, **options)[2:])  # 8 bytes
    call = call_of(gpu)
    for _ in range(4):
        call(X, 3)
    assert len(call.ran) == 4


def test_arguments_and_results_keep_their_places(gpu):
    """Also of one tensor that was two arguments, and of results that were made in another order."""

    @replay.repeated()
    def call(x, y):
        first, second = (replay.empty((n,), torch.float32, x.device) for n in (5, 7))
        replay.launch(gpu.kernel, (1,), first, (x, y), 3, 3, 0.5, WIDTH=16, IS_SET=True)
        return second, first

    for _ in range(2):
        call(X, X)
    other = X.clone()
    results = call(X, other)
    assert type(results) is tuple and [result.shape for result in results] == [(7,), (5,)]
    assert gpu.started[-1][9:11] == (results[1].data_ptr(), (X.data_ptr(), other.data_ptr()))


def test_a_tape_keeps_no_tensor_alive(gpu):
    made = []

    def hide(*arguments):
        tensor = replay.empty(*arguments)
        made.append(weakref.ref(tensor))
        return tensor

    call = call_of(gpu, hide=hide)
    for _ in range(4):
        x = torch.zeros(64)
        made += [weakref.ref(x), weakref.ref(call(x, 3))]
        del x
        gpu.by_triton.clear()
        gc.collect()
        assert not [each for each in made if each() is not None]
    assert len(call.ran) == 2


def test_a_tensor_without_elements_has_no_memory(gpu):
    """It has no place behind another one in a block either."""

    def hide(size, dtype, device):
        replay.empty(size, dtype, device)
        return replay.empty((0,), dtype, device)

    call = call_of(gpu, hide=hide)
    for _ in range(3):
        call(X, 3)
    assert len(call.ran) == 2 and gpu.started[-2][10] == (None, 0)


def test_forgotten_calls_run_again(gpu, monkeypatch):
    call = call_of(gpu)
    for _ in range(3):
        call(X, 3)
    monkeypatch.setitem(replay._all_tapes[0], "another function's", None)
    replay.forget()
    assert not any(replay._all_tapes)
    call(X, 3)
    assert len(call.ran) == 3


def test_only_the_newest_calls_are_kept(gpu, monkeypatch):
    monkeypatch.setattr(replay, "MOST_TAPES", 3)
    call = call_of(gpu)
    for number in (3, 3, 4, 5, 3, 6, 3):  # the last but one drops the first
        call(X, number)
    assert call.ran == [3, 3, 4, 5, 6, 3]


def test_a_call_that_fails_leaves_no_tape_behind(gpu):
    @replay.repeated()
    def call(x):
        raise KeyError

    for _ in range(3):
        with pytest.raises(KeyError):
            call(X)
    other = call_of(gpu)
    for _ in range(3):
        other(X, 3)
    assert len(other.ran) == 2


WATCHED = {
    "enter hook": {"launch_enter_hook": print}, "exit hook": {"launch_exit_hook": print},
    "hooks": {"launch_exit_hook": SimpleNamespace(calls=[print])}, "debug": {"debug": True},
    "inspection": {"add_stages_inspection_hook": print}, "instrumentation": {}, "another run": {}, "pre-run hook": {},
    "untried": {}, "nothing": {"launch_enter_hook": SimpleNamespace(calls=[])},
}  # fmt: skip


@pytest.mark.parametrize("name", WATCHED)
def test_watched_launches_are_left_to_triton(name, gpu, monkeypatch):
    call = call_of(gpu)
    for _ in range(3):
        call(X, 3)
    start(gpu)
    gpu.by_triton.clear()
    gpu.started.clear()
    runtime = {"launch_enter_hook": None, "launch_exit_hook": None, "debug": False} | WATCHED[name]
    compilation = SimpleNamespace(instrumentation_mode="all" if name == "instrumentation" else "")
    monkeypatch.setattr(
        launching, "knobs", SimpleNamespace(runtime=SimpleNamespace(**runtime), compilation=compilation)
    )
    if name == "pre-run hook":
        gpu.kernel.add_pre_run_hook(print)
    elif name == "untried":
        monkeypatch.setattr(launching, "IS_TRIED", False)
    elif name == "another run":
        monkeypatch.setattr(launching, "_TRITONS", {})
    call(X, 3)
    start(gpu)
    is_watched = name != "nothing"
    assert len(call.ran) == 2 + is_watched
    assert (len(gpu.by_triton), len(gpu.started)) == ((3, 0) if is_watched else (0, 3))


def test_options_and_an_outer_recording_are_not_recorded(gpu):
    """An inner call's launches belong to the outer tape; a call with options, as tests make, is no user's."""
    inner, ran = call_of(gpu), []

    @replay.repeated()
    def outer(x):
        ran.append(x)
        return inner(x, 3)

    for _ in range(3):
        inner(X, 4, blocks=1)
        outer(X)
    assert inner.ran == [4, 3, 4, 3, 4] and len(ran) == 2


def test_the_tensors_in_a_block_share_nothing():
    tensors = [
        torch.empty(3, dtype=torch.float32),
        torch.empty_strided((2, 5, 7), (70, 7, 1), dtype=torch.bfloat16),
        torch.empty(1, dtype=torch.int32),
        torch.empty(8, 128, dtype=torch.float64),
    ]
    (function, arguments), places = replay._block(tensors)
    block = function(*arguments)
    assert (block.dtype, block.dim()) == (torch.uint8, 1)
    assert all(place % replay.BLOCK_BYTES == 0 for place in places)
    for place, tensor, end in zip(places, tensors, [*places[1:], block.untyped_storage().nbytes()], strict=True):
        assert place + tensor.untyped_storage().nbytes() <= end


@pytest.mark.parametrize(("elements", "blocks"), [(0, 0), (1, 1), (128, 1), (129, 2)])
def test_a_block_is_no_larger_than_its_tensors(elements, blocks):
    (_, (size, *_)), places = replay._block([torch.empty(elements, dtype=torch.float32)] * 2)
    assert (size, places) == ((2 * blocks * replay.BLOCK_BYTES,), [0, blocks * replay.BLOCK_BYTES])


def test_a_block_lies_on_the_device_of_its_tensors():
    (function, arguments), _ = replay._block([torch.empty(3, device="meta")])
    assert function(*arguments).device.type == "meta"


class CudaLauncher:
    """As Triton's: it calls a function of C with more arguments between the grid and the kernel's."""

    calls, turns, packs = 1, False, False

    def __init__(self):
        self.global_scratch_size = self.profile_scratch_size = 0
        self.gsan_enabled = False

    def launch(self, *args):
        raise AssertionError("nothing is started")

    def __call__(self, x, y, z, stream, *args):
        *more, last = args
        for _ in range(self.calls):
            grid = (z, y, x) if self.turns else (x, y, z)
            self.launch(*grid, stream, "cooperative", *more, (last,) if self.packs else last)


class AnotherLauncher(CudaLauncher):
    """A class that nobody has looked at."""


def starter(launcher, grid):
    """What a tape keeps of a compiled kernel with that launcher."""
    return replay._starter(SimpleNamespace(run=launcher, function="function", packed_metadata="metadata"), grid)


@pytest.mark.parametrize("packs", [False, True])
def test_the_function_of_c_is_called_without_tritons_launcher(packs):
    launcher = CudaLauncher()
    launcher.packs = packs
    if packs:
        del launcher.gsan_enabled  # older versions have none
    function, grid, more, is_flat = starter(launcher, (3, 2))
    assert (function, grid, is_flat) == (launcher.launch, (3, 2, 1), not packs)
    assert [*more] == ["cooperative", "function", "metadata", None, None, None]


@pytest.mark.parametrize("name", ["global_scratch_size", "profile_scratch_size"])
def test_a_launcher_that_does_not_tell_its_scratch_memory_is_kept(name):
    launcher = CudaLauncher()
    delattr(launcher, name)
    assert starter(launcher, (3,))[:2] == (launcher, (3, 1, 1))


@pytest.mark.parametrize("made", [
    {"global_scratch_size": 8}, {"profile_scratch_size": 8}, {"gsan_enabled": True}, {"turns": True}, {"calls": 2}, {},
], ids=str)  # fmt: skip
def test_a_launcher_that_does_more_is_kept(made):
    launcher = CudaLauncher() if made else AnotherLauncher()
    vars(launcher).update(made)
    more = "function", "metadata", None, None, None
    assert starter(launcher, (3, 2)) == (launcher, (3, 2, 1), more, True)


def test_no_block_for_nothing():
    assert replay._block([]) == (None, [])


@pytest.mark.parametrize("stride", [(12, 4, 1), (1, 2, 6)])
def test_an_allocation_is_torchs(stride):
    function, arguments = replay._allocation((2, 3, 4), stride, torch.float16, torch.device("cpu"))
    made = function(*arguments)
    assert (made.shape, made.stride(), made.dtype) == ((2, 3, 4), stride, torch.float16)
    assert not made.requires_grad


@pytest.mark.parametrize(("index", "is_quick"), [(0, True), (1, False)])
def test_an_allocation_on_another_device_names_it(index, is_quick, gpu, monkeypatch):
    """Torch's quick function allocates on the current device, whatever it is asked for."""
    quick = object()
    monkeypatch.setattr(torch._C._dynamo.guards, "_empty_strided_cuda", quick, raising=False)
    device = torch.device("cuda", index)
    function, arguments = replay._allocation((2,), (1,), torch.float16, device)
    assert (function is quick) == is_quick
    assert arguments == ((2,), (1,), torch.float16) if is_quick else function.keywords["device"] == device
