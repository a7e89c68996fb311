from __future__ import annotations

import os
import signal
from collections import Counter
from contextlib import suppress
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # pytest -n 2: each worker has a core of its own
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

with suppress(ValueError):  # not in the main thread
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a run in the background has ignored

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Where there is no GPU, kernels run in Triton's interpreter.  Triton reads this when it is first imported: by what follows.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from helpers import REDUCED, Oracle, write_checkpoint

import minisd

if os.environ.get("TRITON_INTERPRET"):
    with suppress(ImportError):  # Triton is for Linux
        from interpreter import repair_index

        repair_index()

torch.backends.cudnn.allow_tf32 = False  # float32 is compared to five digits; by default a GPU convolves with three


# What most changes break first, in under a minute: pytest -m quick.
QUICK = (
    "models",
    "diffusion",
    "text",
    "pictures",
    "test_request",
    "test_pipeline",
    "test_layout",
)
NOT_QUICK = (
    "triton",
    "test_every_sampler_and_guide",
    "test_six_sizes",
    "test_every_published_checkpoint",
    "test_what_changes",
    "test_over_many",
    "test_again",
    "test_every_module",
    "both_ways",
    "test_a_touched_network",
    "test_same_seed",
    "test_is_the_rule_of_its_source",
    "test_draws_a_picture",
    "test_picture_i",
    "test_models_and_diffusion_can_be_copied_out",
    "test_every_step_equals",
    "test_equals_diffusers",
    "test_a_process_says_the_same",
    "test_comfyuis_latents",
    "test_residuals",
    "test_unet_with_features",
    "test_weighted_and_long",
    "test_edited_steps",
    "test_by_hand",
)


# What takes so long that by default one case of every n is run, or none where n is 0; with -m seldom the others are.
SELDOM = {
    "test_200_kills_during_a_save_leave_the_old_or_the_new_file_whole": 0,
    "test_a_checkpoint_decides_the_style_and_the_prompt_the_content": 0,
    "test_a_file_as_it_is_written_draws_and_goes_through_every_command": 8,
    "test_a_key_names_the_unit_of_its_number": 0,
    "test_a_mixture_is_trained_as_what_is_left_of_it": 2,
    "test_a_recipe_may_hold_anything": 0,
    "test_accuracy_of_the_tiny_checkpoint": 0,
    "test_all_files": 12,
    "test_all_recipes": 0,
    "test_all_recipes_of_comparisons": 0,
    "test_all_texts": 17,
    "test_any_width_and_depth_of_every_family": 0,
    "test_attention": 3,
    "test_blocks_run[docs/addons.md]": 0,
    "test_blocks_run[docs/batch.md]": 0,
    "test_blocks_run[docs/drawing.md]": 0,
    "test_blocks_run[docs/files.md]": 0,
    "test_blocks_run[docs/inside.md]": 0,
    "test_blocks_run[docs/python.md]": 0,
    "test_commands_that_are_ended_at_any_moment": 0,
    "test_compile_names_registers_spills_and_shared_memory": 0,
    "test_diffusers_opens_it_and_draws_the_same": 5,
    "test_every_sampler_and_guide_both_ways": 4,
    "test_every_sampler_draws_by_its_own_spacing": 4,
    "test_every_sampler_draws_what_the_prompt_says": 3,
    "test_every_sampler_of_the_field_both_ways": 8,
    "test_every_sampler_over_every_spacing_with_every_guidance": 3,
    "test_every_step_equals_the_plain_way": 2,
    "test_files": 3,
    "test_group_norm_hostile_values": 2,
    "test_group_norm_odd_shapes": 2,
    "test_folders[all]": 0,
    "test_group_norm_of_many_chunks": 3,
    "test_group_norm_over_a_skip_connection": 6,
    "test_group_norm_real_widths": 3,
    "test_half_precision": 0,
    "test_inspect_names_the_writer_and_lists_what_is_unneeded": 8,
    "test_kernels": 0,
    "test_labelled_grid_keeps_pictures_and_fits_texts": 0,
    "test_layer_norm": 3,
    "test_layer_norm_of_a_stream_that_is_added_to": 4,
    "test_linear_step": 2,
    "test_little_memory_is_told[all]": 0,
    "test_loras_beside_diffusers": 0,
    "test_measured_order_is_the_claimed_one_or_the_table_says_why": 8,
    "test_names_that_are_not_in_the_streams_letters": 3,
    "test_nobody_reads_any": 3,
    "test_other_gpus": 0,
    "test_outputs": 4,
    "test_over_many_steps_the_ways_part_no_further_than_rounding_takes_them": 3,
    "test_protocol": 3,
    "test_recipes_in_pictures[all]": 0,
    "test_recipes_of_comparisons[all]": 0,
    "test_recipes_of_merges[all]": 0,
    "test_refuses": 2,
    "test_roofline_leaves_the_terminal_alone": 0,
    "test_save_then_load_is_the_same_model_for_every_family": 4,
    "test_shapes_of_a_checkpoint_are_those_that_the_kernels_know": 0,
    "test_shapes_of_a_checkpoint_say_where_and_how_often": 0,
    "test_signals": 3,
    "test_single_precision": 0,
    "test_six_sizes_in_turns_and_a_weight_that_changes": 2,
    "test_streams": 4,
    "test_streams_of_all": 11,
    "test_surroundings": 6,
    "test_surroundings_of_all": 11,
    "test_text_to_image": 3,
    "test_texts": 3,
    "test_there_and_back_changes_no_bit": 3,
    "test_unet_with_kernels_equals_the_one_without": 2,
    "test_vae_against_diffusers": 0,
    "test_variables": 6,
    "test_variables_of_a_drawing": 5,
    "test_what_stands_there_is_whole_after_an_error": 3,
    "test_what_is_drawn_has_the_spread_of_the_distribution": 3,
    "test_whole_steps_with_kernels[triton]": 0,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    seen: Counter[str] = Counter()
    for item in items:
        if item.name in SELDOM or getattr(item, "originalname", "") in SELDOM:
            name = item.name if item.name in SELDOM else item.originalname  # type: ignore[attr-defined]
            if not SELDOM[name] or seen[name] % SELDOM[name]:
                item.add_marker("seldom")
            seen[name] += 1
        among = {*item.path.relative_to(Path(__file__).parent).with_suffix("").parts} & {*QUICK}
        elsewhere = item.get_closest_marker("slow") or item.get_closest_marker("seldom") or item.get_closest_marker("gpu")
        if among and not elsewhere and not any(name in item.name for name in NOT_QUICK):
            item.add_marker("quick")


@pytest.fixture(scope="session")
def reduced_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SD 1.x at a tenth of the width, random weights, float32."""
    return write_checkpoint(tmp_path_factory.mktemp("reduced") / "reduced.safetensors")


@pytest.fixture(scope="session")
def reduced(reduced_file: Path) -> minisd.Pipeline:
    return minisd.load(reduced_file, device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def oracle(reduced_file: Path) -> Oracle:
    return Oracle(reduced_file, REDUCED)


@pytest.fixture(scope="session")
def tiny() -> minisd.Pipeline:
    """The trained checkpoint in the box, as a user on a CPU gets it."""
    return minisd.load(device="cpu")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
