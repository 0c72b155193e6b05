"""What the CPU that stands in for a GPU promises: what host.h computes, and which mistakes it shows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from host_device import Buffer, HostDevice, Kernel, host_device
from numpy.typing import NDArray

SEEDS = (0, 1, 2, 3)

KERNELS = r"""
// Each thread reads what the one opposite wrote.
KERNEL(128, 1) reverse(const int64 *a, const int64 *p) {
    int *out = (int *)a[0], *room = (int *)shared_memory();
    for (int i = 0; i < 3; i++) {
        room[threadIdx.x] = threadIdx.x * 10 + i;
        if (p[0]) __syncthreads();
        out[i * blockDim.x + threadIdx.x] = room[blockDim.x - 1 - threadIdx.x];
        __syncthreads();
    }
}

KERNEL(64, 1) sums(const int64 *a, const int64 *p) {
    const float *x = (const float *)a[0];
    float *out = (float *)a[1];
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    out[2 * i] = warp_sum(x[i]);
    out[2 * i + 1] = warp_max(x[i]);
}

KERNEL(32, 1) exchanges(const int64 *a, const int64 *p) {
    double *out = (double *)a[0] + threadIdx.x * 8;
    int l = threadIdx.x;
    out[0] = shuffle(l * 0.5f, 7);
    out[1] = __shfl_sync(0xffffffffu, l * 3, (l + 1) % 32);
    out[2] = __shfl_xor_sync(0xffffffffu, l * 0.1, 5);
    out[3] = (double)__shfl_up_sync(0xffffffffu, (uint64)l << 40, 3);
    out[4] = __shfl_down_sync(0xffffffffu, (unsigned)l, 4);
    out[5] = __ballot_sync(0xffffffffu, l % 3 == 0);
    out[6] = __popc(l) + __ffs(l) + __clz(l);
    out[7] = rsqrtf(4.0f) + min(l, 5) + max(1.5f, (float)l);
}

// c = x y + c: x [16, 16] and y [16, 8] are halves, c [16, 8] float. `way` is how the fragments come into registers.
KERNEL(32, 1) product(const int64 *a, const int64 *p) {
    const unsigned short *x = (const unsigned short *)a[0], *y = (const unsigned short *)a[1];
    float *c = (float *)a[2];
    unsigned short *room = (unsigned short *)shared_memory();
    int l = threadIdx.x, g = l / 4, t = l % 4;
    for (int i = l; i < 256; i += 32) room[i] = x[i];
    for (int i = l; i < 128; i += 32) room[256 + i] = y[i];
    warp_barrier();
    unsigned r[4], s[4];
    if (p[0]) {
        load_matrices(r, room + (l % 16) * 16 + l / 16 * 8);
        load_matrices_turned(s, room + 256 + l % 16 * 8);
    } else {
        for (int i = 0; i < 4; i++) r[i] = *(const unsigned *)(x + (g + i % 2 * 8) * 16 + 2 * t + i / 2 * 8);
        for (int i = 0; i < 2; i++) {
            const unsigned short *q = y + (2 * t + i * 8) * 8 + g;
            s[i] = q[0] | (unsigned)q[8] << 16;
        }
    }
    float sum[4];
    for (int i = 0; i < 4; i++) sum[i] = c[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
    multiply(sum, r, s);
    for (int i = 0; i < 4; i++) c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sum[i];
}

// c = x yᵀ + c of a warpgroup: x [64, 16] and y [n, 16] are halves, c [64, n] float. y lies among 64 columns, from
// the 16 k-th on, swizzled; p: k, whether to wait for the product, what is added to the descriptor.
template <int COUNT> FUNCTION void wide_product(const int64 *a, const int64 *p) {
    const unsigned short *x = (const unsigned short *)a[0], *y = (const unsigned short *)a[1];
    float *c = (float *)a[2], sums[COUNT];
    const int n = 2 * COUNT;
    char *room = shared_memory() + 1024;
    int l = threadIdx.x % 32, first = threadIdx.x / 32 * 16 + l / 4, t = l % 4, k = p[0];
    for (int i = threadIdx.x; i < 16 * n; i += blockDim.x) {
        int row = i / 16, piece = 2 * k + i % 16 / 8;
        *(unsigned short *)(room + 128 * row + 16 * (piece ^ row % 8) + 2 * (i % 8)) = y[i];
    }
    unsigned operand[4];
    for (int i = 0; i < 4; i++) operand[i] = *(const unsigned *)(x + (first + i % 2 * 8) * 16 + 2 * t + i / 2 * 8);
    for (int i = 0; i < COUNT; i++) sums[i] = c[(first + i % 4 / 2 * 8) * n + i / 4 * 8 + 2 * t + i % 2];
    __syncthreads();
    begin_products();
    uint64 at = (uint64)(shared_address(room) + 32 * k) >> 4;
    multiply_wide(sums, operand, (at | 1ull << 16 | 64ull << 32 | 1ull << 62) + (uint64)p[2]);
    end_products();
    if (p[1]) wait_for_products<0>();
    for (int i = 0; i < COUNT; i++) c[(first + i % 4 / 2 * 8) * n + i / 4 * 8 + 2 * t + i % 2] = sums[i];
}
KERNEL(128, 1) wide_16(const int64 *a, const int64 *p) { wide_product<16>(a, p); }
KERNEL(128, 1) wide_128(const int64 *a, const int64 *p) { wide_product<128>(a, p); }

// Thread 0 asks for many bytes, and all wait for them, twice; or once, and nobody waits.
KERNEL(64, 1) whole(const int64 *a, const int64 *p) {
    uint64 *come = (uint64 *)shared_memory();
    int *room = (int *)(shared_memory() + 16), *out = (int *)a[1];
    if (threadIdx.x == 0) mbarrier_init(come, 1);
    shared_for_copies();
    __syncthreads();
    for (int turn = 0; turn <= p[0]; turn++) {
        if (threadIdx.x == 0) {
            mbarrier_expect(come, 256);
            copy_whole(room, (const int *)a[0] + 64 * turn, 256, come);
        }
        if (p[0]) mbarrier_wait(come, turn);
        out[64 * turn + threadIdx.x] = room[63 - threadIdx.x];
        __syncthreads();
    }
}

// A thread asks for four copies; a warp waits for the third, and then tells which ones have come.
KERNEL(64, 1) copies(const int64 *a, const int64 *p) {
    uint64 *come = (uint64 *)shared_memory();
    int *room = (int *)(shared_memory() + 64), i = threadIdx.x % 4;
    if (threadIdx.x < 4) mbarrier_init(come + i, 1);
    shared_for_copies();
    __syncthreads();
    if (threadIdx.x < 32) {
        for (int j = 0; j < 4 && threadIdx.x == 0; j++)
            mbarrier_expect(come + j, 16), copy_whole(room + 4 * j, (const int *)a[0] + 4 * j, 16, come + j);
    } else {
        mbarrier_wait(come + 2, 0);
        ((int *)a[1])[i] = room[4 * i];
    }
    __syncthreads();
    for (int j = 0; j < 4; j++) mbarrier_wait(come + j, 0);
    if (p[0] && threadIdx.x < 4) ((int *)a[1])[i] = room[4 * i];
}

// Round after round each block reads what the next one wrote in the round before.
KERNEL(64, 1) around(const int64 *a, const int64 *p) {
    int *out = (int *)a[0], n = gridDim.x * blockDim.x, i = blockIdx.x * blockDim.x + threadIdx.x;
    unsigned *arrivals = (unsigned *)a[1];
    for (int round = 0; round < 4; round++) {
        int *from = out + round * n, *to = from + n;
        to[i] = from[(i + blockDim.x) % n] + 1;
        if (p[0]) grid_barrier(arrivals, (round + 1) * gridDim.x, blockDim.x);
    }
}

// The turn of each thread in each of three phases, between barriers of the grid, of the block, or of the warp.
KERNEL(64, 1) phases(const int64 *a, const int64 *p) {
    unsigned *out = (unsigned *)a[0], n = gridDim.x * blockDim.x, *turns = (unsigned *)a[1], *arrivals = turns + 1;
    for (int i = 0; i < 3; i++) {
        out[i * n + blockIdx.x * blockDim.x + threadIdx.x] = atomicAdd(turns, 1u);
        if (p[0] == 0) grid_barrier(arrivals, (i + 1) * gridDim.x, blockDim.x);
        if (p[0] == 1) __syncthreads();
        if (p[0] == 2) warp_barrier();
    }
}

KERNEL(64, 1) half_a_block(const int64 *a, const int64 *p) {
    if (p[0] && threadIdx.x >= 32) return;
    if (threadIdx.x < 32) __syncthreads();
    else warp_sum(1.0f), grid_barrier((unsigned *)a[0], 1, blockDim.x);
}

KERNEL(32, 1) half_a_warp(const int64 *a, const int64 *p) {
    if (threadIdx.x < 16) warp_barrier();
    else if (p[0]) shuffle(1.0f, 0);
}

KERNEL(32, 1) write(const int64 *a, const int64 *p) { ((char *)a[0])[p[0]] = 1; }
KERNEL(32, 1) write_shared(const int64 *a, const int64 *p) { shared_memory()[p[0]] = 1; }
KERNEL(32, 1) read_wide(const int64 *a, const int64 *p) {
    *(uint4 *)a[1] = p[1] ? load_weights((char *)a[0] + p[0]) : *(const uint4 *)(a[0] + p[0]);
}
KERNEL(32, 1) garbage(const int64 *a, const int64 *p) {
    ((int *)a[0])[blockIdx.x] = ((int *)shared_memory())[p[0]];
    ((int *)shared_memory())[p[0]] = 5;
}
KERNEL(32, 1) deep(const int64 *a, const int64 *p) {
    volatile char room[1 << 17];
    for (int i = (1 << 17) - 1; i >= 0; i -= 64) room[i] = 1;
    *(char *)a[0] = room[0];
}

// Two groups of copies; waits for all but `p[0]`, none if negative.
KERNEL(32, 1) later(const int64 *a, const int64 *p) {
    int4 *room = (int4 *)shared_memory(), *out = (int4 *)a[1];
    const int4 *from = (const int4 *)a[0];
    int l = threadIdx.x;
    room[l] = room[32 + l] = make_int4(7, 7, 7, 7);
    for (int i = 0; i < 2; i++) {
        copy_later(room + i * 32 + l, from + i * 32 + l);
        end_group();
    }
    if (p[0] == 0) wait_for_groups<0>();
    if (p[0] == 1) wait_for_groups<1>();
    if (p[1]) warp_barrier();
    int other = 31 - l;
    out[other] = room[other];
    out[32 + other] = room[32 + other];
}

KERNEL(64, 1) halves(const int64 *a, const int64 *p) {
    for (int64 i = threadIdx.x; i < p[0]; i += blockDim.x) ((unsigned short *)a[1])[i] = to_half(((float *)a[0])[i]);
}
KERNEL(64, 1) floats(const int64 *a, const int64 *p) {
    for (int64 i = threadIdx.x; i < p[0]; i += blockDim.x) {
        unsigned short h = ((unsigned short *)a[0])[i];
        ((float *)a[1])[2 * i] = from_half(h);
        ((float *)a[1])[2 * i + 1] = from_brain(h);
    }
}
KERNEL(64, 1) pairs(const int64 *a, const int64 *p) { *(unsigned *)a[0] = to_halves(1.0f, -2.0f); }

KERNEL(256, 1) count(const int64 *a, const int64 *p) {
    unsigned *n = (unsigned *)a[0];
    unsigned at = atomicAdd(n, 1u);
    atomicMax(n + 1, at);
    atomicMin(n + 2, at);
    atomicAdd((int *)n + 3, -2);
    if (p[0]) n[4 + at] = blockIdx.x * blockDim.x + threadIdx.x;
}
"""


class Bench:
    """A device with the kernels above, and calls that take and give arrays."""

    def __init__(self, seed: int) -> None:
        self.device: HostDevice = host_device(seed)
        self.program = self.device.program(KERNELS)

    def buffer(self, array: NDArray[Any]) -> Buffer:
        """The array on the device."""
        buffer = self.device.zeros(array.nbytes)
        self.device.put(buffer.address, array)
        return buffer

    def run(
        self,
        name: str,
        arrays: list[NDArray[Any]],
        *numbers: int,
        blocks: int = 1,
        threads: int = 32,
        shared: int = 0,
        together: bool = False,
    ) -> list[NDArray[Any]]:
        """Launches a kernel on copies of the arrays; the arrays as it leaves them."""
        buffers = [self.buffer(x) for x in arrays]
        a = self.buffer(np.array([b.address for b in buffers] or [0], np.int64))
        p = self.buffer(np.array(numbers or [0], np.int64))
        kernel: Kernel = self.program.kernel(name)
        self.device.launch(kernel, a.address, p.address, blocks, threads, shared, together)
        self.device.check()
        return [self.device.get(b.address, np.empty_like(x)) for b, x in zip(buffers, arrays, strict=True)]


@pytest.fixture(params=SEEDS)
def bench(request: pytest.FixtureRequest) -> Bench:
    """One for each order of threads."""
    return Bench(request.param)


@pytest.fixture(scope="module")
def plain() -> Bench:
    """One whose threads run in ascending order."""
    return Bench(0)


def test_threads_of_a_block_meet(bench: Bench) -> None:
    for threads in (128, 100, 1):
        (out,) = bench.run("reverse", [np.zeros((3, threads), np.int32)], 1, threads=threads, shared=512)
        assert (out == np.arange(threads)[::-1] * 10 + np.arange(3)[:, None]).all()


def test_a_missing_barrier_depends_on_the_seed() -> None:
    def answer(seed: int) -> bytes:
        return Bench(seed).run("reverse", [np.zeros((3, 128), np.int32)], 0, threads=128, shared=512)[0].tobytes()

    assert answer(0) != answer(1)
    assert len({answer(seed) for seed in range(10)}) > 5
    assert answer(3) == answer(3)  # a seed is one order


def test_sums_of_a_warp_are_the_butterfly(bench: Bench) -> None:
    x = (np.random.default_rng(1).standard_normal((10, 32)) * 1e3 ** np.arange(10)[:, None]).astype(np.float32)
    _, out = bench.run("sums", [x, np.zeros((10, 32, 2), np.float32)], blocks=5, threads=64)
    total = x.copy()
    for i in (16, 8, 4, 2, 1):
        total = total + total[:, np.arange(32) ^ i]
    assert out[..., 0].tobytes() == total.tobytes()
    assert (out[..., 1] == x.max(axis=1, keepdims=True)).all()


def test_lanes_exchange(bench: Bench) -> None:
    (out,) = bench.run("exchanges", [np.zeros((32, 8))])
    lane = np.arange(32)
    assert (out[:, 0] == 3.5).all()
    assert (out[:, 1] == (lane + 1) % 32 * 3).all()
    assert (out[:, 2] == (lane ^ 5) * 0.1).all()
    assert (out[:, 3] == np.where(lane < 3, lane, lane - 3) * 2.0**40).all()
    assert (out[:, 4] == np.where(lane > 27, lane, lane + 4)).all()
    assert (out[:, 5] == sum(1 << i for i in range(0, 32, 3))).all()
    bits = [i.bit_count() + (i & -i).bit_length() + 32 - i.bit_length() for i in range(32)]
    assert (out[:, 6] == bits).all()
    assert (out[:, 7] == 0.5 + np.minimum(lane, 5) + np.maximum(lane, 1.5)).all()


@pytest.mark.parametrize("way", [0, 1])
def test_tensor_cores_multiply(bench: Bench, way: int) -> None:
    rng = np.random.default_rng(2)
    x, y = rng.standard_normal((16, 16)).astype(np.float16), rng.standard_normal((16, 8)).astype(np.float16)
    c = rng.standard_normal((16, 8)).astype(np.float32)
    out = bench.run("product", [x, y, c], way, shared=768)[2]
    assert np.abs(out - (c + x.astype(np.float64) @ y.astype(np.float64))).max() < 1e-6


@pytest.mark.parametrize("k", [0, 3])
@pytest.mark.parametrize("count", [16, 128])
def test_warpgroups_multiply(bench: Bench, count: int, k: int) -> None:
    rng = np.random.default_rng(2)
    x, y = (rng.standard_normal((rows, 16)).astype(np.float16) for rows in (64, 2 * count))
    c = rng.standard_normal((64, 2 * count)).astype(np.float32)

    def run(*numbers: int) -> NDArray[np.float32]:
        return bench.run(f"wide_{count}", [x, y, c], k, *numbers, threads=128, shared=1024 + 256 * count)[2]

    want = c + x.astype(np.float64) @ y.astype(np.float64).T
    assert np.abs(run(1, 0) - want).max() < 1e-5
    assert (run(0, 0) == c).all()  # nobody has waited for it
    assert not (np.abs(run(1, -8 << 32) - want) < 1e-5).all()  # as if eight rows further were nearer
    with pytest.raises(AssertionError, match="not swizzled by 128 bytes"):
        run(1, 1 << 62)


def test_whole_copies_come_when_somebody_waits(bench: Bench) -> None:
    x = np.arange(128, dtype=np.int32)
    out = bench.run("whole", [x, np.zeros_like(x)], 1, threads=64, shared=272)[1]
    assert (out.reshape(2, 64) == x.reshape(2, 64)[:, ::-1]).all()
    with pytest.raises(AssertionError, match="a block ends while 256 bytes are on their way to it"):
        bench.run("whole", [x, np.zeros_like(x)], 0, threads=64, shared=272)


def test_copies_come_in_the_order_of_the_seed(bench: Bench) -> None:
    x = np.arange(16, dtype=np.int32)
    there = [bench.run("copies", [x, np.zeros(4, np.int32)], late, threads=64, shared=128)[1] for late in (0, 1)]
    assert (there[1] == x[::4]).all()
    expected = {0: [True, True, True, False], 1: [False, False, True, True]}
    assert (there[0] == x[::4])[2]
    if bench.device.seed in expected:
        assert (there[0] == x[::4]).tolist() == expected[bench.device.seed]


def test_blocks_of_a_grid_meet(bench: Bench) -> None:
    for blocks in (1, 3):
        start = np.zeros((5, blocks * 64), np.int32)
        start[0] = np.arange(blocks * 64)
        arrays = [start, np.zeros(1, np.uint32)]
        out, arrivals = bench.run("around", arrays, 1, blocks=blocks, threads=64, together=True)
        for r in range(5):
            assert (out[r] == (np.arange(blocks * 64) + 64 * r) % (blocks * 64) + r).all()
        assert arrivals == 4 * blocks


def test_a_missing_barrier_of_the_grid_depends_on_the_seed() -> None:
    arrays = [np.zeros((5, 3 * 64), np.int32), np.zeros(1, np.uint32)]
    answers = [Bench(s).run("around", arrays, 0, blocks=3, threads=64, together=True)[0] for s in (0, 1)]
    assert (answers[0] != answers[1]).any()


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("way", "width"), [(0, 192), (1, 64), (2, 32)])
def test_every_phase_is_in_the_order_of_the_seed(seed: int, way: int, width: int) -> None:
    arrays = [np.zeros((3, 192 // width, width), np.uint32), np.zeros(2, np.uint32)]
    out = Bench(seed).run("phases", arrays, way, blocks=3, threads=64, together=True)[0]
    blocks = np.arange(192 // width)[:, None]
    for i in range(3):
        turns = out[i].argsort(axis=1)
        first = (blocks if seed == 0 else blocks[::-1]) * 3 * width + i * width  # all of one's phases, then the next's
        if seed < 2:
            assert (turns == (np.arange(width) if seed == 0 else np.arange(width)[::-1])).all()
            assert (out[i].min(axis=1, keepdims=True) == first).all()
        assert (np.ptp(out[i], axis=1) == width - 1).all()


def test_blocks_that_come_one_by_one_never_meet(bench: Bench) -> None:
    with pytest.raises(AssertionError, match=r"around: deadlock.* 1 at a grid barrier"):
        bench.run("around", [np.zeros((5, 192), np.int32), np.zeros(1, np.uint32)], 1, blocks=3, threads=64)


@pytest.mark.parametrize("others", [0, 1])
def test_a_barrier_for_half_a_block_is_an_error(bench: Bench, others: int) -> None:
    if others:
        with pytest.raises(AssertionError, match=r"of its 64 threads 32 wait at a block barrier.* 32 have returned"):
            bench.run("half_a_block", [np.zeros(1, np.uint32)], 1, threads=64)
    else:  # the others come to the block's barrier too, within the grid's
        with pytest.raises(AssertionError, match="deadlock"):
            bench.run("half_a_block", [np.zeros(1, np.uint32)], 0, threads=64)
    test_threads_of_a_block_meet(bench)  # all is well after an error


def test_a_warp_whose_lanes_do_not_all_come_is_an_error(bench: Bench) -> None:
    with pytest.raises(AssertionError, match=r"deadlock.* 16 at warp_barrier .*16 have returned"):
        bench.run("half_a_warp", [], 0)
    with pytest.raises(AssertionError, match=r"meet at (warp_barrier and at __shfl_sync|__shfl_sync and at warp_bar)"):
        bench.run("half_a_warp", [], 1)
    with pytest.raises(AssertionError, match="deadlock"):
        bench.run("sums", [np.zeros(20, np.float32), np.zeros(40, np.float32)], threads=20)


def test_writes_outside_shared_memory_are_errors(plain: Bench) -> None:
    plain.run("write_shared", [], 99, shared=100)
    for at, match in (100, "past its 100 bytes"), (163, "past"), (-1, "before"):
        with pytest.raises(AssertionError, match=match):
            plain.run("write_shared", [], at, shared=100)
        with pytest.raises(AssertionError, match=match):
            plain.run("write_shared", [], at, blocks=3, shared=100, together=True)


def test_writes_behind_a_buffer_are_errors(plain: Bench) -> None:
    plain.run("write", [np.zeros(10, np.uint8)], 9)
    with pytest.raises(AssertionError, match="behind a buffer of 10 bytes"):
        plain.run("write", [np.zeros(10, np.uint8)], 10)
    with pytest.raises(AssertionError, match="in no buffer"):
        plain.device.put(plain.device.zeros(8).address, np.zeros(3, np.int32))


def test_bad_addresses_are_errors(plain: Bench) -> None:
    bytes_, out = np.arange(64, dtype=np.uint8), np.zeros(16, np.uint8)
    assert (plain.run("read_wide", [bytes_, out], 16, 1)[1] == bytes_[16:32]).all()
    with pytest.raises(AssertionError, match="thread 0 of block 0: load_weights of an address that is no multiple"):
        plain.run("read_wide", [bytes_, out], 8, 1)
    with pytest.raises(AssertionError, match="misaligned"):
        plain.run("read_wide", [bytes_, out], 8, 0)
    with pytest.raises(AssertionError, match="bad or misaligned address"):
        plain.run("write", [np.zeros(1, np.uint8)], 1 << 50)
    with pytest.raises(AssertionError, match="stack is full"):
        plain.run("deep", [out])


def test_shared_memory_begins_as_garbage(bench: Bench) -> None:
    for together in (False, True):
        (out,) = bench.run("garbage", [np.zeros(3, np.int32)], 2, blocks=3, threads=1, shared=12, together=together)
        assert (out == -1).all()


def test_a_launch_the_device_cannot_hold_is_an_error(plain: Bench) -> None:
    plain.run("write_shared", [], 0, shared=plain.device.shared_bytes)
    with pytest.raises(AssertionError, match="shared memory"):
        plain.run("write_shared", [], 0, shared=plain.device.shared_bytes + 1)
    with pytest.raises(AssertionError, match="4 blocks at once"):
        plain.run("write_shared", [], 0, blocks=4, shared=plain.device.shared_bytes, together=True)
    with pytest.raises(AssertionError, match="blocks of 1056 threads"):
        plain.run("write_shared", [], 0, threads=1056, shared=4)


def test_copies_come_late(bench: Bench) -> None:
    x = np.arange(256, dtype=np.int32).reshape(64, 4)
    out = bench.run("later", [x, np.zeros_like(x)], 0, 1, shared=1024)[1]
    assert (out == x).all()
    out = bench.run("later", [x, np.zeros_like(x)], 1, 1, shared=1024)[1]
    assert (out[:32] == x[:32]).all()
    assert (out[32:] == -1).all()  # neither what was before nor what is to come
    out = bench.run("later", [x, np.zeros_like(x)], -1, 1, shared=1024)[1]
    assert (out == -1).all()
    out = bench.run("later", [x, np.zeros_like(x)], 0, 0, shared=1024)[1]
    assert not (out == x).all()  # each lane waits for its own copies only


def test_halves_round_as_numpy_does(plain: Bench) -> None:
    every = np.arange(65536, dtype=np.uint16)
    half = every.view(np.float16).astype(np.float32)
    _, out = plain.run("floats", [every, np.zeros((65536, 2), np.float32)], 65536, threads=64)
    for got, expected in (out[:, 0], half), (out[:, 1], (every.astype(np.uint32) << 16).view(np.float32)):
        number = ~np.isnan(expected)
        assert (np.isnan(got) == ~number).all()
        assert (got[number].view(np.uint32) == expected[number].view(np.uint32)).all()

    finite = np.sort(half[np.isfinite(half)])
    ties = (finite[1:] + finite[:-1]) / 2
    rng = np.random.default_rng(3)
    edges = np.array([65504, 65519.996, 65520, 65536, 1e38, np.inf, 2**-24, 2**-25, 2**-26, 1e-45, 0], np.float32)
    x = np.concatenate([half, ties, np.nextafter(ties, np.float32(np.inf)), np.nextafter(ties, np.float32(-np.inf)),
                        edges, -edges, rng.integers(0, 1 << 32, 200_000, np.uint32).view(np.float32),
                        rng.standard_normal(200_000, np.float32)]).astype(np.float32)  # fmt: skip
    _, got = plain.run("halves", [x, np.zeros(len(x), np.uint16)], len(x), threads=64)
    with np.errstate(over="ignore"):
        expected = x.astype(np.float16)
    number = ~np.isnan(x)
    assert (got[number] == expected.view(np.uint16)[number]).all()
    assert np.isnan(got.view(np.float16)[~number]).all()
    (pair,) = plain.run("pairs", [np.zeros(2, np.float16)])
    assert pair.tolist() == [1, -2]


def test_atomics_count(bench: Bench) -> None:
    n = np.zeros(4 + 3 * 256, np.uint32)
    n[2] = 1 << 31
    (out,) = bench.run("count", [n], 1, blocks=3, threads=256)
    assert out[:3].tolist() == [768, 767, 0]
    assert out[3:4].view(np.int32) == -2 * 768
    assert sorted(out[4:]) == list(range(768))
    if bench.device.seed < 2:
        assert (out[4:] == np.arange(768)[:: -1 if bench.device.seed else 1]).all()


def test_what_the_compiler_refuses_is_told(plain: Bench) -> None:
    with pytest.raises(AssertionError, match="stranger"):
        plain.device.program("KERNEL(32, 1) f(const int64 *a, const int64 *p) { stranger(a, p); }")


def test_memory_moves(plain: Bench) -> None:
    device = plain.device
    x = np.arange(6, dtype=np.float32)
    one, two = plain.buffer(x), device.zeros(x.nbytes)
    assert one.address % 256 == two.address % 256 == 0
    assert not device.get(two.address, np.ones(6, np.float32)).any()
    device.copy(two.address, one.address + 4, 8)
    device.wait()
    assert device.get(two.address, np.empty(6, np.float32)).tolist() == [1, 2, 0, 0, 0, 0]


def test_any_number_of_programs_runs_in_a_process() -> None:
    """The stacks of those that have not run for a while are given back: a process may have some 65,000 maps."""
    device = host_device()
    with open("/proc/self/maps") as file:
        before = len(file.readlines())
    buffer = device.zeros(8)
    for i in range(12):
        text = f"KERNEL(512, 1) run(const int64 *a, const int64 *p) {{ if (!threadIdx.x) ((int64 *)a)[0] = {i}; }}"
        device.launch(device.program(text).kernel("run"), buffer.address, 0, 3, 512, together=True)
        assert device.get(buffer.address, np.empty(1, np.int64))[0] == i
    with open("/proc/self/maps") as file:
        assert len(file.readlines()) - before < 8 * 2 * 3 * 512 + 500
