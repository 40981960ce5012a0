"""Which layers share blocks, for models whose layers see differently far."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from ruvon.models.cache_groups import CacheGroup, cache_groups, layers_a_block, place_of


def groups_of(*windows, max_positions=32768):
    return cache_groups(SimpleNamespace(windows=windows, max_positions=max_positions))


def test_layers_that_are_alike_are_one_group():
    assert groups_of(0, 0, 0) == (CacheGroup(0, (0, 1, 2)),)
    assert groups_of(9, 9) == (CacheGroup(9, (0, 1)),)


def test_alternating_layers_are_two_groups():
    """As in gpt-oss, whose first layer slides."""
    whole, sliding = groups_of(*(128, 0) * 12)
    assert (whole.window, sliding.window) == (0, 128)
    assert whole.layers == tuple(range(1, 24, 2))
    assert sliding.layers == tuple(range(0, 24, 2))


def test_the_larger_kind_is_cut_to_the_smaller_ones_size():
    """As in Gemma 3: five layers slide, one does not."""
    groups = groups_of(*((512,) * 5 + (0,)) * 3)
    assert [group.window for group in groups] == [0, 512, 512, 512, 512, 512]
    assert groups[0].layers == (5, 11, 17)
    assert {len(group.layers) for group in groups} == {3}


def test_a_group_may_have_fewer_layers_than_a_block_holds():
    groups = groups_of(*((512,) * 5 + (0,)) * 4, 512, 512)  # 26 layers
    assert [len(group.layers) for group in groups] == [4, 4, 4, 4, 4, 4, 2]


def test_there_are_few_groups_even_if_more_would_waste_less():
    groups = groups_of(*(0,) * 30, 4096, 4096)
    assert len(groups) == 7
    assert layers_a_block(groups) == 5


def test_a_window_that_holds_all_positions_is_none():
    assert groups_of(0, 128, 512, max_positions=128) == (CacheGroup(0, (0, 1, 2)),)
    assert len(groups_of(0, 128, max_positions=129)) == 2


@pytest.mark.parametrize(
    "windows", [(0,) * 5, (128, 0) * 6, (512, 512, 512, 512, 512, 0) * 4, (7, 0, 9, 0, 7)]
)
def test_every_layer_has_a_place_of_its_own(windows):
    groups = groups_of(*windows)
    places = [place_of(groups, layer) for layer in range(len(windows))]
    assert len(set(places)) == len(windows)
    for window, (group, place) in zip(windows, places, strict=True):
        assert groups[group].window == window
        assert place < layers_a_block(groups)
