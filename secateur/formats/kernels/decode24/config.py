"""Launch configs of the decode kernel, and the layer and number of tokens that they are for."""

from dataclasses import astuple, dataclass, fields, replace
from math import ceil

import torch

from secateur.formats.kernels.decode24.arrange import (
    UNIT_COLUMNS,
    UNIT_ROWS,
    Kind,
    Structure,
    unit_bytes,
    value_bytes,
)
from secateur.formats.kernels.measured import integers

SPARSE_FROM = (8, 0)  # mma.sp
CLUSTERS_FROM = (9, 0)  # clusters, bulk copies and dependent launch; before: the portable form
WARPGROUPS_ON = (9, 0)  # wgmma, on that generation alone
MOST_TOKENS = 64  # operand B has 8 tokens; more than 8 of it and the sums leave the registers
TOKEN_TILE = 8
# Of a token's row in shared memory, for the sparse tensor cores and the dense ones.
PADDING_BYTES = {False: 16, True: 64}
RESERVED_BYTES = 1024  # of each CTA's shared memory, for the system
SM_BYTES = 228 * 1024  # of shared memory on sm_80, sm_90 and sm_100
REGISTERS = 65536  # of an SM
# Registers for the dense tensor cores, found by compiling some hundred launch configs: of a step's
# numbers at their columns and what they are made from; of codes, for each streamed piece that a
# thread copies; of 4-bit ones, what the compiler takes to expand each further unit ahead, and for
# token tiles.
PLACED, EACH_UNIT, EACH_PIECE = 16, 5, 3
SEVERAL_TOKENS = {1: 0, 2: 12, 4: 24, 8: 60}  # by token tiles
# And what more without zeros, where a unit has twice the codes: for each further unit ahead, for
# four token tiles, and, of eight, for each further unit of a ring of more than four stages.
OF_ALL_UNIT, OF_ALL_FOUR, OF_ALL_STAGE = 5, 8, 6
HELD = 12  # by a thread beside its sums and weights, about; the compiler can do with a few less
COPY_BYTES = 128  # bulk copies are slower to places that are not aligned to it
ATOM_BYTES = 1024  # wgmma's swizzled operand starts at a multiple of it
# `Trigger` of kernel.cu: when the next kernel's CTAs may start. At once; when this one's inputs
# are there; after its loop; or when the kernel before releases it, so that they come about when its
# activations do.
EARLY, AFTER_INPUTS, AFTER_LOOP, RELEASED = 0, 1, 2, 3
# How long CTAs in excess stay, in thousands of cycles: a little where the next kernel's CTAs come
# at once, else most of the time that the others' weights take, at so many bytes in a thousand.
STAY_EARLY, MOST_STAY, STAY_BYTES = 2, 4, 20_000


BUCKETS = (2, 8, 16, 32, 64)
# What stands before a weight's numbers in tables of launch configs.
IN_TABLES = {Structure.TWO_OF_FOUR: "", Structure.FOUR_OF_EIGHT: "4:8 ", Structure.ALL: "dense "}
GATES = ("silu", "gelu", "gelu_tanh")  # by the number that GATE has
MOST_FUSED = BUCKETS[0]  # tokens


def bucket(tokens: int) -> int:
    """The most tokens that share a compiled kernel and its launch config with `tokens`."""
    return next(most for most in BUCKETS if tokens <= most)


@dataclass(frozen=True)
class Case:
    """What a kernel is compiled and launched for: the layer, its numbers and the tokens."""

    kind: Kind
    grouped: bool
    dtype: torch.dtype
    rows: int
    columns: int
    tokens: int

    @property
    def token_tiles(self) -> int:
        """The tiles of 8 tokens that a warp multiplies each weight with: 1, 2, 4 or 8."""
        return ceil(bucket(self.tokens) / TOKEN_TILE)

    @property
    def pairs(self) -> int:
        """The token pairs of a sum that are sent: one, or all four of a token tile."""
        return 1 if self.tokens <= 2 else 4

    @property
    def widest(self) -> "Case":
        """This case with the most tokens of its bucket: what is compiled and measured."""
        return replace(self, tokens=bucket(self.tokens))

    @property
    def weight(self) -> str:
        """The weight, as tables of launch configs name it: `int4/128 4096x14336`."""
        name = self.kind.numbers.name.lower()
        numbers = IN_TABLES[self.kind.structure] + name + ("/128" if self.grouped else "")
        return f"{numbers} {self.rows}x{self.columns}"

    @property
    def unit_bytes(self) -> int:
        return unit_bytes(self.kind, self.grouped)

    @property
    def nbytes(self) -> int:
        """The bytes of the units."""
        return self.row_tiles * self.units * self.unit_bytes

    @property
    def row_tiles(self) -> int:
        return self.rows // UNIT_ROWS

    @property
    def units(self) -> int:
        """Units of 128 columns in a row; the last one may be padded."""
        return ceil(self.columns / UNIT_COLUMNS)


@dataclass(frozen=True)
class Fusion:
    """What the kernel does beside the product, at one or two tokens: see `Input` in kernel.cu.

    With `normed` the inputs are a residual stream, normalised by RMS; with a `gate`, rows of
    [gate, up]. With `adds` the results are added to what y holds.
    """

    normed: bool = False
    gate: str = ""
    adds: bool = False

    @property
    def defines(self) -> tuple[tuple[str, int], ...]:
        number = GATES.index(self.gate) if self.gate else 0
        kind = 1 if self.normed else 2 if self.gate else 0
        return ("INPUT", kind), ("GATE", number), ("ADD", int(self.adds))


PLAIN = Fusion()


@dataclass(frozen=True)
class LaunchConfig:
    """One launch config. A cluster of `cluster` CTAs, each of `warp_rows` x `splits` warps.

    A warp has `tiles` x 16 rows and 1 / (cluster splits) of the columns, in `stages` of `units` x
    128 columns. With `x_stages` the activations are streamed in as many stages, else they lie whole
    in shared memory. `warpgroup` multiplies by four warps together (sm_90a only); with
    `ahead` a warp reads its weights one step ahead of multiplying them. CTAs in excess stay `stay`
    thousand cycles after the kernel before has ended.
    """

    cluster: int
    warp_rows: int
    splits: int
    tiles: int
    units: int
    stages: int
    trigger: int
    x_stages: int = 0
    warpgroup: int = 0
    ahead: int = 0
    stay: int = 0

    def __str__(self) -> str:
        return ",".join(map(str, astuple(self)))

    @staticmethod
    def parse(text: str) -> "LaunchConfig":
        """The launch config that `str` wrote.

        Raises: ValueError unless the text lists an integer for each field.
        """
        return LaunchConfig(*integers(text, len(fields(LaunchConfig)), "a launch config"))

    @property
    def warps(self) -> int:
        return self.warp_rows * self.splits

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def tiles_of_cluster(self) -> int:
        return self.warp_rows * self.tiles

    @property
    def static_bytes(self) -> int:
        """Static shared memory: the rows' scales and biases, and the barriers.

        A barrier for each stage of each warp, and one for the sums.
        """
        rows = UNIT_ROWS * self.tiles_of_cluster
        return 2 * 2 * rows + 8 * (self.warps * self.stages + 1)

    def clusters(self, case: Case) -> int:
        """Clusters with rows to compute."""
        return ceil(case.row_tiles / self.tiles_of_cluster)

    def with_stay(self, case: Case) -> "LaunchConfig":
        """This config with the stay that is about right; the right one can only be measured."""
        if self.trigger == EARLY:
            return replace(self, stay=STAY_EARLY)
        nbytes = case.units // self.cluster * self.tiles_of_cluster * case.unit_bytes
        return replace(self, stay=min(MOST_STAY, round(nbytes / STAY_BYTES)))

    def steps(self, case: Case) -> int:
        """The most steps that a warp makes through its ring."""
        return ceil(case.units / (self.cluster * self.splits) / self.units)

    def shared_bytes(self, case: Case) -> int:
        """Dynamic shared memory of a CTA, as `kernel.cu` lays it out."""
        chunk = _aligned(self.units * case.unit_bytes)
        ring = self.warps * self.stages * self.tiles * chunk
        parts = ceil(self.tiles_of_cluster * max(1, case.token_tiles // 2) / self.cluster)
        positions = 2 if case.pairs == 1 else TOKEN_TILE * min(case.token_tiles, 2)
        rows = UNIT_ROWS if case.pairs == 1 else UNIT_ROWS + 2
        sums = parts * self.cluster * self.splits * rows * 4 * positions
        x_unit = TOKEN_TILE * case.token_tiles * 2 * UNIT_COLUMNS
        slack = ATOM_BYTES if self.warpgroup else COPY_BYTES
        if self.x_stages:
            x = self.x_stages * self.splits * self.units * x_unit
            return slack + max(x + ring, sums)
        units = ceil(case.units / self.cluster)
        row = units * 2 * UNIT_COLUMNS + PADDING_BYTES[case.kind.on_dense_cores]
        x = units * x_unit if self.warpgroup else case.tokens * row
        return slack + _aligned(x) + ring + sums

    def why_not_fused(self, case: Case, fusion: Fusion) -> str | None:
        """Why a launch by this config cannot do more than multiply, or None."""
        if fusion == PLAIN:
            return None
        if case.tokens > MOST_FUSED:
            return f"at most {MOST_FUSED} tokens are fused, got {case.tokens}"
        if self.x_stages or self.warpgroup:
            return "its inputs do not lie whole in shared memory"
        if fusion.normed and case.dtype == torch.float16:
            return "a stream times the norm's weight can leave float16's range"
        return None

    def defines(
        self, case: Case, portable: bool, fusion: Fusion = PLAIN
    ) -> tuple[tuple[str, int], ...]:
        """The macros of `kernel.cu`, whose head says what each means."""
        return (
            *fusion.defines,
            ("KIND", int(case.kind.numbers)),
            ("STRUCTURE", int(case.kind.structure)),
            ("GROUP_SCALES", int(case.grouped)),
            ("HALF", int(case.dtype == torch.float16)),
            ("TOKEN_TILES", case.token_tiles),
            ("TOKEN_PAIRS", case.pairs),
            ("CLUSTER", self.cluster),
            ("WARP_ROWS", self.warp_rows),
            ("WARP_SPLITS", self.splits),
            ("WARP_TILES", self.tiles),
            ("STEP_UNITS", self.units),
            ("STAGES", self.stages),
            ("TRIGGER", self.trigger),
            ("STREAM", int(self.x_stages > 0)),
            ("X_STAGES", max(2, self.x_stages)),
            ("WHOLE_STEPS", int(case.units % (self.cluster * self.splits * self.units) == 0)),
            ("REFILL", int(self.steps(case) > self.stages)),
            ("CTAS_PER_SM", self.blocks(case)),
            ("WGMMA", self.warpgroup),
            ("READ_AHEAD", self.ahead),
            ("STAY_KILOCYCLES", self.stay),
            ("PORTABLE", int(portable)),
        )

    def registers(self, case: Case) -> int:
        """About how many registers a thread needs, for its sums and for multiplying a unit."""
        sums = 4 * case.token_tiles
        raw = value_bytes(case.kind) // 128 + (1 if case.kind.structure is Structure.ALL else 3)
        held = HELD + self.tiles * (sums + (1 + self.ahead) * raw * self.units)
        if self.warpgroup:
            addresses = 20 if case.token_tiles <= 2 else 48
            return held + addresses + (sums if case.grouped else 0)
        return held + 16 * min(case.token_tiles, 2) + self._registers_of_dense_cores(case)

    def _registers_of_dense_cores(self, case: Case) -> int:
        """What a thread needs beside that for numbers at their columns, and to put them there."""
        if not case.kind.on_dense_cores:
            return 0
        once = case.token_tiles <= 2  # else a unit's of all tiles are held at once
        placed = PLACED if once else PLACED * (2 * self.tiles - 1)
        if case.kind.numbers is Kind.W16:
            return placed
        pieces = self.splits * self.units * case.token_tiles * TOKEN_TILE * UNIT_COLUMNS // 8
        copies = EACH_PIECE * ceil(pieces / self.threads) if self.x_stages else 0
        if case.kind.numbers is Kind.INT8:
            return placed + copies
        ahead = EACH_UNIT * (self.tiles * self.units - 1)
        several = SEVERAL_TOKENS[case.token_tiles] + self._registers_of_all(case)
        return placed + ahead + several + copies

    def _registers_of_all(self, case: Case) -> int:
        """What 4-bit codes without zeros take beside those of 4:8."""
        if case.kind.structure is not Structure.ALL:
            return 0
        if case.token_tiles <= 2:
            return OF_ALL_UNIT * (self.tiles * self.units - 1)
        if case.token_tiles == 4:
            return OF_ALL_FOUR
        return OF_ALL_STAGE * self.units * max(0, self.stages - 4)

    def most_registers(self, blocks: int) -> int:
        """The registers a thread can have if `blocks` CTAs share an SM, allotted by four warps."""
        return min(255, REGISTERS // (blocks * 128 * ceil(self.warps / 4)) // 8 * 8)

    def blocks(self, case: Case) -> int:
        """CTAs that share an SM: two, where one of the next kernel's can stand beside this one.

        Two must share the registers as well; where a thread needs too many, it would spill.
        """
        whole = self.shared_bytes(case) + self.static_bytes + RESERVED_BYTES
        fits = whole <= SM_BYTES // 2
        return 2 if fits and self.registers(case) <= self.most_registers(2) else 1


def _aligned(nbytes: int) -> int:
    return ceil(nbytes / COPY_BYTES) * COPY_BYTES
