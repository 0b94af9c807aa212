"""Reading compiled text: every duration below is written out as arithmetic."""

import pytest

from scope_jax.hardware import Chip
from scope_jax.hlo import KERNEL_EFFICIENCY, estimate, parse

CHIP = Chip(flops=1e12, hbm=1e9, bandwidth=1e11, link=1e9, clock=1e9)
SQUARE = [(0, 0), (1, 0), (0, 1), (1, 1)]  # four chips: a corner has two links
CYCLES = 'backend_config={"window_config":{"estimated_cycles":"%d"}}'
MEGABYTE = "f32[250000]{0}"


def seconds(body: str, turns: int = 1, others: str = ""):
    text = f"HloModule m\n{others}\nENTRY %main (p: f32[]) -> f32[] {{\n{body}\n}}\n"
    return estimate(parse(text), CHIP, SQUARE, turns)


def fusion(name: str, cycles: int) -> str:
    return f"  %{name} = f32[8]{{0}} fusion(%p), kind=kLoop, calls=%f, {CYCLES % cycles}"


def test_cycles_of_operations_add_up():
    found = seconds("\n".join([fusion("a", 1000), fusion("b", 500)]))
    assert found.compute == found.seconds == pytest.approx(1500 / 1e9)
    assert found.sent == 0


def test_an_operation_without_an_estimate_takes_nothing():
    assert seconds(fusion("a", 2**63 - 1)).seconds == 0


def test_a_loop_counts_its_turns():
    loop = """
%body (x: (s32[])) -> (s32[]) {
""" + fusion("a", 100) + """
}
%cond (x: (s32[])) -> pred[] {
  %bound = s32[] constant(28)
  ROOT %less = pred[] compare(%i, %bound), direction=LT
}
"""  # fmt: skip
    line = "  %w = (s32[]) while(%t), condition=%cond, body=%body"
    assert seconds(line, others=loop).seconds == pytest.approx(28 * 100 / 1e9)
    known = line + ', backend_config={"known_trip_count":{"n":"3"}}'
    assert seconds(known, others=loop).seconds == pytest.approx(3 * 100 / 1e9)
    unknown = seconds(line, turns=7, others=loop.replace("direction=LT", "direction=NE"))
    assert unknown.seconds == pytest.approx(7 * 100 / 1e9)
    assert unknown.unknown_loops == 1


def collective(kind, name, operand="%p", groups="{{0,1,2,3}}", shape=MEGABYTE):
    return f"  %{name} = {shape} {kind}({operand}), replica_groups={groups}, dimensions={{0}}"


@pytest.mark.parametrize(
    "kind, received", [("all-gather", 0.75), ("all-reduce", 1.5), ("reduce-scatter", 3.0)]
)
def test_a_collective_that_nothing_hides_adds_bytes_over_links(kind, received):
    found = seconds(collective(kind, "c"))
    assert found.compute == 0
    assert found.sent == pytest.approx(received * 1e6)
    assert found.seconds == pytest.approx(received * 1e6 / (2 * 1e9))  # two links of a corner


def test_a_group_along_one_axis_has_one_link():
    found = seconds(collective("all-gather", "c", groups="{{0,1},{2,3}}"))
    assert found.seconds == pytest.approx(0.5 * 1e6 / 1e9)


@pytest.mark.parametrize("groups", ["[1,4]<=[4]", "mesh['a'=2,'b'=2] {'a','b'}"])
def test_other_ways_to_write_a_group(groups):
    assert seconds(collective("all-gather", "c", groups=groups)).sent == pytest.approx(0.75e6)


def pair(between: str) -> str:
    start = f"  %s = ({MEGABYTE}, {MEGABYTE}) all-gather-start(%p), replica_groups={{{{0,1,2,3}}}}"
    done = f"  %d = {MEGABYTE} all-gather-done(%s)"
    return "\n".join([start, between, done])


def test_a_transfer_hides_behind_what_is_computed_meanwhile():
    wire = 0.75e6 / 2e9  # 375 us
    hidden = seconds(pair(fusion("a", 400_000)))
    assert hidden.seconds == pytest.approx(400e-6)
    partly = seconds(pair(fusion("a", 100_000)))
    assert partly.seconds == pytest.approx(wire)
    assert partly.compute == pytest.approx(100e-6)


def test_transfers_share_the_links():
    two = pair(fusion("a", 1)) + "\n" + pair(fusion("b", 1)).replace("%s", "%t").replace("%d", "%e")
    assert seconds(two).seconds == pytest.approx(2 * 0.75e6 / 2e9)


def test_a_sparse_cores_transfer_begins_when_its_data_comes():
    others = """
%called (q: f32[]) -> f32[] {
""" + collective("all-gather", "g") + """
}
%wrapped (q: f32[]) -> f32[] {
  %x = f32[250000]{0} custom-call(%q), custom_call_target="z", called_computations={%called}
}
"""  # fmt: skip
    lines = [
        "  %s = ((), ()) async-start(), calls=%wrapped",
        fusion("before", 1_000_000),
        "  %u = ((f32[1]), ()) async-update(%s, %before)",
        fusion("meanwhile", 100_000),
        f"  %d = {MEGABYTE} async-done(%u)",
    ]
    found = seconds("\n".join(lines), others=others)
    assert found.sent == pytest.approx(0.75e6)
    assert found.seconds == pytest.approx(1e-3 + 0.75e6 / 2e9)


def test_the_attention_kernel_is_counted_by_formula_and_its_lines_do_not_end_the_program():
    heads, length, size = 4, 1024, 128
    shape = f"bf16[{heads},{length},{size}]{{2,1,0}}"
    call = (
        f"  %splash_mha_fwd_x.1 = {shape} custom-call(%a, %b), "
        'custom_call_target="tpu_custom_call", '
        f"operand_layout_constraints={{s8[1,8,8]{{2,1,0}}, {shape}, {shape}}}, "
        'frontend_attributes={kernel_metadata={\n"xprof":"{}"\n}}, metadata={op_name="x"}'
    )
    found = seconds(call + "\n" + fusion("after", 1000))
    # Two products; of the triangle's 4 blocks of 512 three are computed.
    flops = 2 * 2 * heads * length * length * size * 3 / 4
    assert found.seconds == pytest.approx(flops / (KERNEL_EFFICIENCY * 1e12) + 1e-6)


def test_the_longest_branch_counts():
    branches = "\n".join(
        f"%{name} (x: f32[]) -> f32[] {{\n{fusion(name, cycles)}\n}}"
        for name, cycles in (("short", 10), ("long", 1000))
    )
    line = "  %c = f32[8] conditional(%i, %x, %y), branch_computations={%short, %long}"
    assert seconds(line, others=branches).seconds == pytest.approx(1e-6)
