"""The tree and its proofs, against the definitions of RFC 6962 written down as they stand there."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentd.audit.tree import EMPTY, Tree, consistency, includes, inclusion, is_consistent, leaf, node, proved, root_of

LEAVES = [leaf(b"%d" % n) for n in range(70)]


def mth(leaves: list[bytes]) -> bytes:
    """Merkle Tree Hash, section 2.1; `leaves` are hashed already."""
    if not leaves:
        return hashlib.sha256(b"").digest()
    if len(leaves) == 1:
        return leaves[0]
    k = split(len(leaves))
    return node(mth(leaves[:k]), mth(leaves[k:]))


def split(n: int) -> int:
    k = 1
    while k * 2 < n:
        k *= 2
    return k


def path(m: int, leaves: list[bytes]) -> list[bytes]:
    """PATH(m, D[n]), section 2.1.1."""
    if len(leaves) == 1:
        return []
    k = split(len(leaves))
    if m < k:
        return [*path(m, leaves[:k]), mth(leaves[k:])]
    return [*path(m - k, leaves[k:]), mth(leaves[:k])]


def subproof(m: int, leaves: list[bytes], b: bool) -> list[bytes]:
    """SUBPROOF(m, D[n], b), section 2.1.2."""
    n = len(leaves)
    if m == n:
        return [] if b else [mth(leaves)]
    k = split(n)
    if m <= k:
        return [*subproof(m, leaves[:k], b), mth(leaves[k:])]
    return [*subproof(m - k, leaves[k:], False), mth(leaves[:k])]


def test_the_known_roots():
    """Of certificate-transparency's own test vectors: the empty tree, and the leaf of nothing."""
    assert EMPTY.hex() == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert leaf(b"").hex() == "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d"
    inputs = ["", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f"]
    root = root_of(leaf(bytes.fromhex(each)) for each in inputs)
    assert root.hex() == "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328"


@pytest.mark.parametrize("size", range(70))
def test_a_tree_that_grows_has_the_root_of_its_leaves(size: int):
    tree = Tree()
    for each in LEAVES[:size]:
        tree.push(each)
    assert (tree.size, tree.root) == (size, mth(LEAVES[:size]))
    assert len(tree.peaks) == size.bit_count()


@pytest.mark.parametrize("size", range(1, 35))
def test_every_leaf_has_its_proof_and_no_other_one_fits(size: int):
    root = mth(LEAVES[:size])
    for index in range(size):
        proof = proved(inclusion(index, size), enumerate(LEAVES))
        assert list(proof) == path(index, LEAVES[:size])
        assert includes(LEAVES[index], index, size, proof, root)
        assert not includes(LEAVES[index + 1], index, size, proof, root)
        assert not includes(LEAVES[index], index, size, proof, leaf(b"other"))
        assert not includes(LEAVES[index], index, size, (*proof, root), root)
        for other in range(size):
            assert includes(LEAVES[index], other, size, proof, root) is (other == index)


@pytest.mark.parametrize("size", range(1, 35))
def test_every_beginning_has_its_proof(size: int):
    root = mth(LEAVES[:size])
    for old in range(1, size + 1):
        proof = proved(consistency(old, size), enumerate(LEAVES[:size]))
        assert list(proof) == ([] if old == size else subproof(old, LEAVES[:size], True))
        assert is_consistent(old, mth(LEAVES[:old]), size, root, proof)
        assert not is_consistent(old, leaf(b"other"), size, root, proof)
        assert not is_consistent(old, mth(LEAVES[:old]), size, leaf(b"other"), proof)


def test_a_proof_of_leaves_that_are_not_there_is_none():
    """At the beginning, in the middle, at the end."""
    spans = inclusion(20, 30)
    there = list(enumerate(LEAVES[:30]))
    for gap in (slice(0, 3), slice(17, 18), slice(28, 30)):
        kept = [*there]
        del kept[gap]
        with pytest.raises(LookupError):
            proved(spans, kept)
    assert proved([], []) == ()


hashes = st.lists(st.sampled_from(LEAVES[:8]), max_size=8)


@settings(max_examples=500, deadline=None)
@given(st.integers(-1, 40), st.integers(-1, 40), hashes, st.sampled_from(LEAVES))
def test_a_made_up_proof_is_none(one: int, other: int, proof: list[bytes], root: bytes):
    """Whatever the numbers are: no exception, and no yes."""
    assert not includes(LEAVES[50], one, other, proof, root)
    if one != other:
        assert not is_consistent(one, LEAVES[51], other, root, proof)
