"""The machine code of the Hopper kernel: what its design promises, and no compiler checks."""

import re

import compiled
import pytest

PRODUCER, CONSUMER = 40, 232  # registers of a thread, which the kernel asks for at run time


@pytest.fixture(scope="module")
def kernels(built):
    """The instances for Hopper, with the columns of their output tiles."""
    found = compiled.kernels("lora_linear_sm90", "90a")
    assert len(found) == 8  # two dtypes, two widths, two layouts
    return [(kernel, int(re.search(r"Li(\d+)E", kernel.name)[1])) for kernel in found]


def highest_register(instructions):
    return max(int(number) for text in instructions for number in re.findall(r"\bR(\d+)\b", text))


def address_of(kernel, instruction):
    (address,) = [address for address, text in kernel.code.items() if instruction in text]
    return address


def test_every_role_stays_within_the_registers_it_asks_for(kernels):
    for kernel, _ in kernels:
        producer = kernel.reachable(address_of(kernel, f"USETMAXREG.DEALLOC.CTAPOOL {PRODUCER:#x}"))
        consumer = kernel.reachable(address_of(kernel, f"USETMAXREG.TRY_ALLOC.CTAPOOL UP0, {CONSUMER:#x}"))
        assert any("UTMALDG" in text for text in producer)
        assert not any("HGMMA" in text for text in producer)
        assert highest_register(producer) < PRODUCER, kernel.name
        assert any("HGMMA" in text for text in consumer)
        assert highest_register(consumer) < CONSUMER, kernel.name


def test_loops_of_products_keep_one_step_in_flight(kernels):
    """A wait for all of them (gsb0, 0x0) in such a loop would be a main loop that the compiler has serialized."""
    for kernel, block_n in kernels:
        loops = [loop for loop in kernel.loops() if any("HGMMA" in text for text in loop)]
        output = [loop for loop in loops if sum(f"HGMMA.64x{block_n}x16" in text for text in loop) == 4]
        assert len(output) >= 2, kernel.name  # along K, and along P
        for loop in loops:
            waits = [text for text in loop if "WARPGROUP.DEPBAR" in text]
            assert [text.split(", ")[-1] for text in waits] == ["0x1"], kernel.name
            assert sum("gsb0" in text for text in loop if "HGMMA" in text) == 1, kernel.name


def test_stages_begin_where_the_swizzle_is_that_of_addresses(kernels):
    """Dynamic shared memory begins at 0x400, behind what the system keeps: a multiple of the 1024 bytes of an atom."""
    for kernel, _ in kernels:
        bases = {text for text in kernel.code.values() if re.match(r"UMOV UR\d+, 0x400$", text)}
        assert bases, kernel.name


def test_descriptors_name_the_swizzle_and_the_stride_of_atoms(kernels):
    """The upper words of both operands of wgmma: swizzle of 128 bytes, 1024 from 8 rows to the next."""
    for kernel, _ in kernels:
        upper = {word for text in kernel.code.values() for word in re.findall(r"UMOV UR\d+, (0x4\d{7})$", text)}
        assert upper == {"0x40000040"}, kernel.name


def test_a_wait_in_the_loop_is_found():
    """Of a kernel that waits for all of its products in every step."""
    product, wait = "HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24, gsb0", "WARPGROUP.DEPBAR.LE gsb0, 0x0"
    texts = [product, wait, "@!P0 BRA 0x0", "EXIT"]
    kernel = compiled.Kernel("k", {16 * i: text for i, text in enumerate(texts)})
    assert kernel.loops() == [texts[:3]]
    assert kernel.reachable(16) == texts
    assert kernel.reachable(48) == ["EXIT"]
