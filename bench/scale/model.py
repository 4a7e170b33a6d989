# SPDX-License-Identifier: MIT
"""FLOPs, bytes and seconds of a layer's attention on one rank, part by part: causal, a trained table, equal slices.

    products   pairs * heads * head_dim * 2 FLOPs a product; the kernels compute whole tiles, and few programs do not
               fill a GPU
    sums       what plain torch adds between the operators' calls: the ring's merges and its sums of gradients;
               all-to-all's copies into and out of its messages
    exchange   bytes that a rank sends, over its slowest link; latency: that of its messages
    table      the table's gradient: each call of the backward operator writes its distances, and the ring adds them
    MLP        the table from the MLP and its backward, on every rank for all distances
    host       launches

A ring's message travels while products are computed, so a step takes the longest of: the GPU's work, the link, the
host. An exchange of all-to-all waits for its tensors, and the products wait for it.
Left out: the sum of the MLP's gradients over the ranks, some ten thousand numbers, and the rest of the layer.
"""

from dataclasses import dataclass

PARTS = ("products", "sums", "exchange", "latency", "table", "MLP", "host")
RING, CONTIGUOUS, ALL_TO_ALL = "ring", "ring, contiguous", "all-to-all"
METHODS = (RING, CONTIGUOUS, ALL_TO_ALL)
# torch's small operations: of a message, of a merge, of the sums of a call's gradients, of an exchange with its copies
HOP_OPERATIONS, MERGE_OPERATIONS, SUM_OPERATIONS, EXCHANGE_OPERATIONS = 8, 18, 4, 8


@dataclass(frozen=True)
class Work:
    """One layer's attention. `size` is the bytes of an element; the table and all sums are float32."""

    total: int
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    batch: int = 1
    size: int = 2
    mlp_dim: int = 128
    depth: int = 2

    def pairs(self):
        """Visible pairs of one head."""
        return self.batch * self.total * (self.total + 1) // 2

    def attention_flops(self, products):
        """Of all heads; forward has 2 products, backward 5 or more."""
        return 2 * products * self.pairs() * self.heads * self.head_dim

    def mlp_flops(self):
        """(forward, backward) of the MLP over all distances; the distances themselves need no gradient."""
        hidden, last = self.mlp_dim**2 * (self.depth - 1), self.mlp_dim * self.heads
        return 2 * self.total * (self.mlp_dim + hidden + last), 2 * self.total * (self.mlp_dim + 2 * (hidden + last))

    def mlp_bytes(self):
        """(forward, backward) that pass through memory: what each layer and its activation read and write."""
        hidden, last = self.depth * self.mlp_dim, self.heads
        return 4 * self.total * (4 * hidden + 3 * last), 4 * self.total * (8 * hidden + 3 * last)

    def shard(self, ranks, size):
        """Bytes of a rank's keys and values, or of their gradients."""
        return self.batch * self.total * self.kv_heads * 2 * self.head_dim * size // ranks

    def rows(self, ranks):
        """Bytes of a rank's queries, or of its result."""
        return self.batch * self.total * self.heads * self.head_dim * self.size // ranks


def ring_bytes(work, ranks):
    """(forward, backward) bytes that a rank sends: its keys, then its keys and their float32 gradients."""
    keys, gradients = work.shard(ranks, work.size), work.shard(ranks, 4)
    return (ranks - 1) * keys, (ranks - 1) * keys + (ranks * gradients if ranks > 1 else 0)


def exchange_bytes(work, ranks):
    """(query and out, key and value) bytes that a rank sends in one exchange. More ranks than key heads copy these."""
    copies = max(1, ranks // work.kv_heads)
    leaves = (ranks - 1) / ranks
    return work.rows(ranks) * leaves, work.shard(ranks, work.size) * copies * leaves


class Clock:
    """Adds up the seconds of one pass, and how long each part keeps its resource busy."""

    def __init__(self, work, machine):
        self.work, self.machine = work, machine
        self.busy = dict.fromkeys(PARTS, 0.0)
        self.seconds = 0.0

    def add(self, share=1.0, times=1, **parts):
        """`times` equal steps. `share`: how much longer they take because processes share cores."""
        for part, seconds in parts.items():
            self.busy[part] += share * times * seconds
        link = parts.get("exchange", 0) + parts.get("latency", 0)
        host = parts.get("host", 0)
        device = sum(parts.values()) - link - host
        self.seconds += share * times * (max(device, link, host) if self.machine.overlaps else device + link + host)

    def computed(self):
        """Seconds of everything but the messages."""
        return sum(seconds for part, seconds in self.busy.items() if part not in ("exchange", "latency"))


def _cdiv(a, b):
    return -(-a // b)


def square(i, j, tile):
    """Pairs that the kernels compute for i queries that see j keys each."""
    return _cdiv(i, tile) * _cdiv(j, tile) * tile * tile


def triangle(i, tile):
    """Pairs that the kernels compute for i queries and keys at the same positions."""
    blocks = _cdiv(i, tile)
    return i * (i + 1) // 2 if tile == 1 else blocks * (blocks + 1) // 2 * tile * tile


def ring_steps(work, machine, ranks, method):
    """[(times, active ranks, [(queries, keys, pairs of a head) of a call])] of the busiest rank."""
    length, tile = _cdiv(work.total, ranks), machine.tile
    if ranks == 1:
        return [(1, 1, [(length, length, triangle(length, tile))])]
    if method == CONTIGUOUS:  # in the step of shift s the last ranks - s ranks work
        later = [(1, ranks - shift, [(length, length, square(length, length, tile))]) for shift in range(1, ranks)]
        return [(1, ranks, [(length, length, triangle(length, tile))]), *later]
    half = _cdiv(length, 2)
    whole, part = (half, half, square(half, half, tile)), (half, half, triangle(half, tile))
    return [(1, ranks, [part, whole, part]), (ranks - 1, ranks, [whole, whole])]


def _product_seconds(work, machine, pairs, rows, heads, products, rate):
    """Seconds of a call: its FLOPs at the rate, less where its programs do not fill the GPU."""
    programs = work.batch * heads * _cdiv(rows, machine.tile)
    fill = min(1.0, programs / machine.units)
    return 2 * products * work.batch * pairs * heads * work.head_dim / rate / fill


def _hop(machine, ranks, size, count=1):
    """(exchange, latency) seconds of a message to the next rank. With several nodes one of the hops leaves a node."""
    if ranks == 1:
        return 0.0, 0.0
    leaves = ranks > machine.node
    rate, latency = (machine.network, machine.network_latency) if leaves else (machine.link, machine.link_latency)
    return size / rate, count * latency


def ring(work, machine, ranks, method=RING):
    """(forward, backward) Clocks of attention in a ring, without the MLP."""
    m, dim, heads = machine, work.head_dim, work.heads
    keys, gradients = work.shard(ranks, work.size), work.shard(ranks, 4)
    forward, backward = Clock(work, m), Clock(work, m)
    steps = ring_steps(work, m, ranks, method)
    for number, (times, active, calls) in enumerate(steps):
        is_last = number == len(steps) - 1
        share = m.share(active)
        rows = work.batch * heads * dim * sum(i for i, _, _ in calls)
        keyed = work.batch * work.kv_heads * 2 * dim * sum(j for _, j, _ in calls)
        products = [
            sum(_product_seconds(work, m, pairs, i, heads, n, rate) for i, _, pairs in calls)
            for n, rate in ((2, m.forward), (m.products_backward, m.backward))
        ]
        parts = {
            "products": products[0],
            # the result in float32 is read and written twice; the call's own result becomes float32
            "sums": rows * (24 + work.size) / m.memory,
            "host": len(calls) * (m.host_forward + MERGE_OPERATIONS * m.host_operation),
        }
        travel = dict(zip(("exchange", "latency"), _hop(m, ranks, keys), strict=True))
        back = dict(zip(("exchange", "latency"), _hop(m, ranks, keys + gradients, 2), strict=True))
        hop_host = HOP_OPERATIONS * m.host_operation if ranks > 1 else 0.0
        later = {
            "products": products[1],
            "sums": (rows + keyed) * (8 + work.size) / m.memory,
            "table": sum(16 * heads * (i + j) for i, j, _ in calls) / m.memory,
            "host": len(calls) * (m.host_backward + SUM_OPERATIONS * m.host_operation),
        }
        moving = times - is_last  # the keys do not travel in the last step
        with_hop = {"host": parts["host"] + hop_host}
        forward.add(share, moving, **(parts | travel | with_hop))
        backward.add(share, moving, **(later | back | {"host": later["host"] + 2 * hop_host}))
        if is_last:
            forward.add(share, 1, **parts)
            backward.add(share, 1, **later)
    # the gradients' last hop, home
    back = dict(zip(("exchange", "latency"), _hop(m, ranks, gradients), strict=True))
    backward.add(m.share(ranks), 1, **back)
    return forward, backward


def _exchange(machine, ranks, size):
    """The parts of one exchange in which a rank sends `size` bytes, the same number to every other rank."""
    if ranks == 1:
        return {}
    outside = max(0, ranks - machine.node) / (ranks - 1)
    is_outside = outside > 0
    seconds = max((1 - outside) * size / machine.link, outside * size / machine.network)
    latency = machine.network_latency if is_outside else machine.link_latency
    return {
        "exchange": seconds,
        "latency": latency,
        "host": (ranks - 2 + EXCHANGE_OPERATIONS) * machine.host_operation,
    }


def all_to_all(work, machine, ranks):
    """(forward, backward) Clocks of attention after an exchange of heads; None if there are too few heads."""
    if work.heads % ranks or (work.kv_heads % ranks and ranks % work.kv_heads):
        return None
    m, heads = machine, work.heads // ranks
    share = m.share(ranks)
    rows, keys = exchange_bytes(work, ranks)
    # copied on both sides, also by a single rank; a copy reads and writes
    whole = work.rows(ranks), work.shard(ranks, work.size) * max(1, ranks // work.kv_heads)
    copied = 4 * sum(whole) / m.memory, 4 * whole[0] / m.memory
    pairs = triangle(work.total, m.tile)
    forward, backward = Clock(work, m), Clock(work, m)
    for clock, n, rate, host in (
        (forward, 2, m.forward, m.host_forward),
        (backward, m.products_backward, m.backward, m.host_backward),
    ):
        for size, copy in zip((rows + keys, rows), copied, strict=True):  # backward has them in the other order
            clock.add(share, 1, **_exchange(m, ranks, size))
            clock.add(share, 1, sums=copy)
        clock.add(share, 1, products=_product_seconds(work, m, pairs, work.total, heads, n, rate), host=host)
    # the operator writes its heads' gradient; the table's has zeros for all other heads
    backward.add(share, 1, table=(4 * heads + 8 * work.heads) * work.total / m.memory)
    return forward, backward


def add_mlp(clocks, ranks):
    """Add the table from the MLP, on every rank."""
    for clock, flops, size in zip(clocks, clocks[0].work.mlp_flops(), clocks[0].work.mlp_bytes(), strict=True):
        m = clock.machine
        clock.add(m.share(ranks), 1, MLP=flops / m.mlp + size / m.memory)


@dataclass(frozen=True)
class Prediction:
    """What a method takes on the busiest rank: a Clock for each pass."""

    forward: Clock
    backward: Clock

    @property
    def seconds(self):
        """Of both passes."""
        return self.forward.seconds + self.backward.seconds

    @property
    def busy(self):
        """{part: seconds of both passes}."""
        return {part: self.forward.busy[part] + self.backward.busy[part] for part in PARTS}

    @property
    def limit(self):
        """The part that keeps its resource busy the longest."""
        return max(PARTS, key=self.busy.get)


def predict(work, machine, ranks, method, has_mlp=True):
    """-> Prediction, or None if the method cannot use so many ranks."""
    clocks = all_to_all(work, machine, ranks) if method == ALL_TO_ALL else ring(work, machine, ranks, method)
    if clocks is None or work.total < 2 * ranks:
        return None
    if has_mlp:
        add_mlp(clocks, ranks)
    return Prediction(*clocks)
