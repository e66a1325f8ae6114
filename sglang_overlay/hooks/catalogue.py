# SPDX-License-Identifier: Apache-2.0
"""Every hook into SGLang. ``python -m sglang_overlay check -v`` prints them, tests walk them.

``STREAMING`` is applied module by module, and if one of its hooks does not fit, no load is streamed. Of ``OPTIONS`` and
``TELLING``, those that fit are applied, since loads are correct without them.
"""

from __future__ import annotations

from sglang_overlay.hooks import built_in, option_hooks
from sglang_overlay.hooks.hook import Hook, HookKind, Place

_FP8 = "sglang.srt.layers.quantization.fp8"
_LOADER = "sglang.srt.model_loader.loader"
_UPDATER = "sglang.srt.model_executor.model_runner_components.weight_updater"
_RUNNER = "sglang.srt.model_executor.model_runner"
_SESSIONS = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
_SESSIONS_BEFORE = "sglang.srt.managers.scheduler_update_weights_mixin.SchedulerUpdateWeightsMixin"
_UPDATE_ISSUES = ("sgl-project/sglang#5424", "sgl-project/sglang#11289", "sgl-project/sglang#30761")
_WHEN_UPSTREAM_UPDATES = "SGLang updates online fp8 weights itself"
_WHEN_UPSTREAM_CHECKS = "SGLang's own checksum covers every byte that is served, in all supported releases"
_WHEN_UPSTREAM_STREAMS = "SGLang streams online fp8 itself (PR #17945 or a successor lands)"
_WHEN_UPSTREAM_CHOOSES = "SGLang offers a choice of online schemes"
_NO_PRESHARDED = "Nothing: this release has no presharded loader."
_NO_SESSIONS = (
    "Sessions: each call is kept or undone by itself. A weight of which a call brings a part keeps its values until "
    "later calls bring the rest; the answer, a success, names it."
)
_MEMORY_ISSUES = ("sgl-project/sglang#2895", "sgl-project/sglang#5576", "sgl-project/sglang#8337")

STREAMING: tuple[Hook, ...] = (
    Hook(
        target=f"{_LOADER}.DefaultModelLoader.load_model",
        wrapper="sglang_overlay.hooks.loader_hooks:load_model",
        kind=HookKind.AROUND,
        parameters=("self", "model_config", "device_config"),
        why="Opens and closes the load that owns all streaming state, measures memory and reports.",
        related=_MEMORY_ISSUES,
        remove_when=_WHEN_UPSTREAM_STREAMS,
    ),
    *(
        Hook(
            target=f"{_LOADER}.{loader}.load_model",
            wrapper=f"sglang_overlay.hooks.loader_hooks:{hook}",
            kind=HookKind.AROUND,
            parameters=("self", "model_config", "device_config"),
            why=why,
            related=_MEMORY_ISSUES,
            remove_when=_WHEN_UPSTREAM_STREAMS,
            without=_NO_PRESHARDED if loader == "PreshardedModelLoader" else "",
        )
        for loader, hook, why in (
            ("RunaiModelStreamerLoader", "load_model", "As for DefaultModelLoader; its buffers are its own."),
            (
                "DummyModelLoader",
                "load_quantized",
                "As for DefaultModelLoader, with random weights; before 0.5.14, fp8 ones.",
            ),
            ("PreshardedModelLoader", "load_model", "As for DefaultModelLoader, when it writes its dump."),
            ("LayeredModelLoader", "load_model", "Says that it is not streamed, under its own name."),
            ("ShardedStateLoader", "load_quantized", "Its files are fp8 already: no bf16 weights, nothing to do."),
        )
    ),
    Hook(
        target=f"{_LOADER}.ShardedStateLoader.save_model",
        wrapper="sglang_overlay.hooks.loader_hooks:save_sharded_state",
        kind=HookKind.AROUND,
        parameters=("model", "path"),
        why="Online fp8 leaves linear weights as transposed views, which safetensors refuses to save: stock cannot "
        "save a model that it has quantized itself.",
        related=("sgl-project/sglang#17945",),
        remove_when="ShardedStateLoader.save_model makes tensors contiguous, as PreshardedModelLoader's dump does",
    ),
    Hook(
        target=f"{_LOADER}.PreshardedModelLoader._load_from_presharded",
        wrapper="sglang_overlay.hooks.loader_hooks:load_from_presharded",
        kind=HookKind.AROUND,
        parameters=("self", "model_config", "device_config"),
        why="The dump is fp8 already: no bf16 weights are allocated, nothing is to be quantized. One that was made of "
        "another checkpoint is refused.",
        related=_MEMORY_ISSUES,
        remove_when=_WHEN_UPSTREAM_STREAMS,
        without=_NO_PRESHARDED,
    ),
    Hook(
        target=f"{_LOADER}.PreshardedModelLoader._first_time_load_and_dump",
        wrapper="sglang_overlay.hooks.loader_hooks:load_and_dump",
        kind=HookKind.AROUND,
        parameters=("self", "model_config", "presharded_dir", "shard_config"),
        why="Says which dumps are there and were made of something else, and keeps what the new one is made of.",
        related=("sgl-project/sglang#17945",),
        remove_when="SGLang compares a dump with the checkpoint",
        without=_NO_PRESHARDED,
    ),
    Hook(
        target=f"{_LOADER}.PreshardedModelLoader._dump_state_to_disk",
        wrapper="sglang_overlay.hooks.loader_hooks:dump_state",
        kind=HookKind.AROUND,
        parameters=("self", "state_dict", "extras", "presharded_dir", "shard_config"),
        why="A checkpoint that lacks weights, or a model that has to be loaded anew, must not leave a dump that later "
        "starts read.",
        related=("sgl-project/sglang#17945",),
        remove_when=_WHEN_UPSTREAM_STREAMS,
        without=_NO_PRESHARDED,
    ),
    Hook(
        target=f"{_LOADER}.PreshardedModelLoader._compute_local_structural_signature",
        wrapper="sglang_overlay.hooks.loader_hooks:describe_without_loading",
        kind=HookKind.AROUND,
        parameters=("self", "model_config"),
        why="Builds the model on the meta device only to hash its shapes; those must be stock's. The hash tells dumps "
        "apart, so scheme, release and device become a part of it.",
        related=("sgl-project/sglang#17945",),
        remove_when=_WHEN_UPSTREAM_STREAMS,
        without=_NO_PRESHARDED,
    ),
    Hook(
        target=f"{_LOADER}.initialize_dummy_weights",
        wrapper="sglang_overlay.hooks.loader_hooks:initialize_dummy_weights",
        kind=HookKind.AROUND,
        parameters=("model",),
        why="Fills the state dict in place, which a parameter without memory cannot take: here one weight at a time.",
        related=("sgl-project/sglang#17945",),
        remove_when=_WHEN_UPSTREAM_STREAMS,
    ),
    Hook(
        target=f"{_LOADER}._initialize_model",
        wrapper="sglang_overlay.hooks.loader_hooks:initialize_model",
        kind=HookKind.AROUND,
        parameters=("model_config", "load_config", "quant_config"),
        why="Once the model is built: finds each streamed layer's name, checks that the model left its placeholders "
        "alone, and wraps the weight loaders. A model that repacks parameters in __init__ is built again without "
        "streaming.",
        related=("sgl-project/sglang#17945",),
        remove_when=_WHEN_UPSTREAM_STREAMS,
    ),
    Hook(
        target="sglang.srt.models.transformers.TransformersBase._init_parameters",
        wrapper="sglang_overlay.hooks.loader_hooks:init_parameters",
        kind=HookKind.AROUND,
        parameters=("self", "module"),
        why="Allocates whatever transformers' code has left without memory. In stock no fp8 layer is among that; here "
        "it would replace each placeholder by a bf16 weight without a loader.",
        related=("sgl-project/sglang#17945",),
        remove_when=_WHEN_UPSTREAM_STREAMS,
        without="Models that run transformers' own code (--model-impl transformers) are loaded as in stock.",
    ),
    Hook(
        target=f"{_LOADER}.DefaultModelLoader._get_all_weights",
        wrapper="sglang_overlay.hooks.loader_hooks:get_all_weights",
        kind=HookKind.AROUND,
        parameters=("self", "model_config", "model"),
        why="Sees the checkpoint's tensors go by: their memory stays as it is, so units can be quantized beside the "
        "loader, which must not be done with memory that model code may use again.",
        related=("sgl-project/sglang#17945",),
        remove_when=_WHEN_UPSTREAM_STREAMS,
    ),
    Hook(
        target=f"{_LOADER}.DefaultModelLoader._prepare_weights",
        wrapper="sglang_overlay.load.checkpoint_files:prepare_weights",
        kind=HookKind.AROUND,
        parameters=("self", "model_name_or_path", "revision", "fall_back_to_pt"),
        why="Notes which files are read, for errors of loads and of updates from disk: those of torch and safetensors "
        "name none, and a name on the hub is no folder.",
        related=("sgl-project/sglang#17945",),
        remove_when="SGLang names the file that cannot be read",
    ),
    Hook(
        target=f"{_LOADER}.device_loading_context",
        wrapper="sglang_overlay.hooks.fp8_methods:device_loading_context",
        kind=HookKind.AROUND,
        parameters=("module", "target_device"),
        why="Runs right before a layer's process_weights_after_loading: swaps the placeholders for the fp8 parameters, "
        "since upstream moves every parameter of the layer to the device here and cannot move one without memory. "
        "Leaves a layer alone that an update fills: SGLang 0.5.18 to 0.5.20 refuse meta tensors here.",
        related=("sgl-project/sglang#17945",),
        remove_when=_WHEN_UPSTREAM_STREAMS,
    ),
    Hook(
        target=f"{_FP8}.Fp8Config.get_quant_method",
        wrapper="sglang_overlay.hooks.scheme_hooks:get_quant_method",
        kind=HookKind.AROUND,
        parameters=("self", "layer", "prefix"),
        why="Gives a layer the quantization method of the scheme that the user chose for it. Stock has one scheme for "
        "online fp8 and refuses block-wise.",
        related=("sgl-project/sglang#15440", "sgl-project/sglang#29727"),
        remove_when=_WHEN_UPSTREAM_CHOOSES,
    ),
    Hook(
        target=f"{_FP8}.Fp8LinearMethod.create_weights",
        wrapper="sglang_overlay.hooks.fp8_methods:create_linear_weights",
        kind=HookKind.AROUND,
        parameters=("self", "layer", "params_dtype"),
        why="Runs upstream's code with the bf16 weight on the meta device: shape, attributes and loader, no memory.",
        related=(*_MEMORY_ISSUES, "sgl-project/sglang#17945"),
        remove_when=_WHEN_UPSTREAM_STREAMS,
    ),
    Hook(
        target=f"{_FP8}.Fp8LinearMethod.process_weights_after_loading",
        wrapper="sglang_overlay.hooks.fp8_methods:process_weights_after_loading",
        kind=HookKind.AROUND,
        parameters=("self", "layer"),
        why="The weight is fp8 already: registers it as stock would leave it instead of quantizing.",
        related=("sgl-project/sglang#17945",),
        remove_when=_WHEN_UPSTREAM_STREAMS,
    ),
    Hook(
        target=f"{_FP8}.Fp8MoEMethod.create_weights",
        wrapper="sglang_overlay.hooks.fp8_methods:create_experts_weights",
        kind=HookKind.AROUND,
        parameters=("self", "layer", "params_dtype"),
        why="As for linear layers: w13 and w2 on the meta device, scales and biases real.",
        related=(*_MEMORY_ISSUES, "sgl-project/sglang#17945"),
        remove_when=_WHEN_UPSTREAM_STREAMS,
    ),
    Hook(
        target=f"{_FP8}.Fp8MoEMethod.process_weights_after_loading",
        wrapper="sglang_overlay.hooks.fp8_methods:process_weights_after_loading",
        kind=HookKind.AROUND,
        parameters=("self", "layer"),
        why="The experts are fp8 already: registers them as stock would leave them instead of quantizing.",
        related=("sgl-project/sglang#17945",),
        remove_when=_WHEN_UPSTREAM_STREAMS,
    ),
    Hook(
        target=f"{_LOADER}.DefaultModelLoader.load_weights_and_postprocess",
        wrapper="sglang_overlay.hooks.update_hooks:load_weights_and_postprocess",
        kind=HookKind.AROUND,
        parameters=("model", "weights", "target_device"),
        why="Called again when weights are updated from disk: streams them into the fp8 storage that "
        "is being served, where stock finds parameters that have lost their loaders.",
        related=_UPDATE_ISSUES,
        remove_when=_WHEN_UPSTREAM_UPDATES,
    ),
    Hook(
        target=f"{_UPDATER}.WeightUpdater.update_weights_from_disk",
        wrapper="sglang_overlay.hooks.update_hooks:update_weights_from_disk",
        kind=HookKind.AROUND,
        parameters=("self", "model_path", "load_format"),
        why="Makes upstream go back to the weights it served before when an update fails, and answer "
        "where that fails too.",
        related=_UPDATE_ISSUES,
        remove_when=_WHEN_UPSTREAM_UPDATES,
        elsewhere=(Place(f"{_RUNNER}.ModelRunner.update_weights_from_disk"),),
    ),
    Hook(
        target=f"{_UPDATER}.WeightUpdater.begin_weight_update",
        wrapper="sglang_overlay.hooks.update_hooks:begin_weight_update",
        kind=HookKind.AROUND,
        parameters=("self",),
        why="Opens an update, which keeps units that come in several calls.",
        related=_UPDATE_ISSUES,
        remove_when=_WHEN_UPSTREAM_UPDATES,
        without=_NO_SESSIONS,
    ),
    Hook(
        target=f"{_UPDATER}.WeightUpdater.end_weight_update",
        wrapper="sglang_overlay.hooks.update_hooks:end_weight_update",
        kind=HookKind.AROUND,
        parameters=("self", "run_post_load"),
        why="Closes the update; upstream's post-processing must not quantize fp8 weights once more.",
        related=_UPDATE_ISSUES,
        remove_when=_WHEN_UPSTREAM_UPDATES,
        without=_NO_SESSIONS,
    ),
    Hook(
        target=f"{_UPDATER}.WeightUpdater.receive_weights_from_distributed",
        wrapper="sglang_overlay.hooks.update_hooks:receive_weights",
        kind=HookKind.AROUND,
        parameters=("self", "names", "dtypes", "shapes", "group_name"),
        why="A rank that has received nothing does not load: the others must hear of it, and keep their weights.",
        related=_UPDATE_ISSUES,
        remove_when=_WHEN_UPSTREAM_UPDATES,
        without="Nothing: update_weights_from_distributed receives and loads.",
    ),
    Hook(
        target=f"{_UPDATER}.WeightUpdater.load_weights_from_distributed",
        wrapper="sglang_overlay.hooks.update_hooks:load_weights_from_distributed",
        kind=HookKind.AROUND,
        parameters=("self", "named_tensors"),
        why="Streams the tensors of one call.",
        related=_UPDATE_ISSUES,
        remove_when=_WHEN_UPSTREAM_UPDATES,
        elsewhere=tuple(
            Place(
                f"{owner}.update_weights_from_distributed",
                "sglang_overlay.hooks.update_hooks:update_weights_from_distributed",
                ("self", "names", "dtypes", "shapes", "group_name"),
            )
            for owner in (f"{_UPDATER}.WeightUpdater", f"{_RUNNER}.ModelRunner")
        ),
    ),
    Hook(
        target=f"{_UPDATER}.WeightUpdater.update_weights_from_tensor",
        wrapper="sglang_overlay.hooks.update_hooks:update_weights_from_tensor",
        kind=HookKind.AROUND,
        parameters=("self", "named_tensors", "load_format"),
        why="Streams the tensors of one call, flattened buckets as well; a failure is answered and "
        "does not end the server.",
        related=_UPDATE_ISSUES,
        remove_when=_WHEN_UPSTREAM_UPDATES,
        elsewhere=(Place(f"{_RUNNER}.ModelRunner.update_weights_from_tensor"),),
    ),
    Hook(
        target=f"{_UPDATER}.WeightUpdater.update_weights_from_ipc",
        wrapper="sglang_overlay.hooks.update_hooks:update_weights_from_ipc",
        kind=HookKind.AROUND,
        parameters=("self", "recv_req"),
        why="Streams what the checkpoint engine sends.",
        related=_UPDATE_ISSUES,
        remove_when=_WHEN_UPSTREAM_UPDATES,
        elsewhere=(Place(f"{_RUNNER}.ModelRunner.update_weights_from_ipc"),),
    ),
    Hook(
        target=f"{_UPDATER}._model_load_weights_direct",
        wrapper="sglang_overlay.hooks.update_hooks:load_weights_direct",
        kind=HookKind.AROUND,
        parameters=("model", "named_tensors"),
        why="Names parameters, not checkpoint tensors: tells high-precision weights from fp8 values and scales.",
        related=_UPDATE_ISSUES,
        remove_when=_WHEN_UPSTREAM_UPDATES,
        elsewhere=(Place(f"{_RUNNER}._model_load_weights_direct"),),
    ),
    *(
        Hook(
            target=f"{_SESSIONS}.{name}",
            wrapper="sglang_overlay.hooks.update_hooks:update_of_all_models",
            kind=HookKind.AROUND,
            parameters=("self", "recv_req"),
            why="Where a draft model cannot be updated, has the target go back to its weights too.",
            related=_UPDATE_ISSUES,
            remove_when=_WHEN_UPSTREAM_UPDATES,
            elsewhere=(Place(f"{_SESSIONS_BEFORE}.{name}"),),
        )
        for name in ("update_weights_from_disk", "update_weights_from_tensor", "update_weights_from_ipc")
    ),
    Hook(
        target=f"{_SESSIONS}.end_weight_update",
        wrapper="sglang_overlay.hooks.update_hooks:end_session",
        kind=HookKind.AROUND,
        parameters=("self", "recv_req"),
        why="Lets the end of a session fail where units came only in part; upstream always answers success.",
        related=_UPDATE_ISSUES,
        remove_when=_WHEN_UPSTREAM_UPDATES,
        without=_NO_SESSIONS,
    ),
    Hook(
        target="sglang.srt.eplb.expert_location_updater.ExpertLocationUpdater.update",
        wrapper="sglang_overlay.hooks.update_hooks:move_experts",
        kind=HookKind.AROUND,
        parameters=("self", "routed_experts_weights_of_layer", "new_expert_location_metadata", "update_layer_ids"),
        why="EPLB moves experts while requests are served, so also between two calls of an update: what has come in "
        "part would go to slots that hold other experts by then, and so would what is put back.",
        related=_UPDATE_ISSUES,
        remove_when=_WHEN_UPSTREAM_UPDATES,
    ),
)

MEASURING: tuple[Hook, ...] = tuple(hook for hook in STREAMING if hook.target.endswith(".load_model"))
"""The hooks needed to report a stock load: ``SGLANG_STREAMFP8=0`` with a folder for reports."""

SERIES: tuple[Hook, ...] = (
    Hook(
        target=f"{built_in.PACKAGE}.loading.load_streaming",
        wrapper="sglang_overlay.hooks.loader_hooks:load_without_the_series",
        kind=HookKind.REPLACE,
        parameters=("load", "args"),
        why="In an SGLang with this project's patch series the overlay streams, since only it has reports, schemes, "
        "weight updates and require.",
        related=("sgl-project/sglang#17945",),
        remove_when=_WHEN_UPSTREAM_STREAMS,
        without="Nothing: SGLang's own releases do not have it.",
    ),
)
"""Applied where the module is imported, which only an SGLang with the patch series does."""

_ARGUMENTS = f"{option_hooks.ARGUMENTS_MODULE}.ServerArgs"

OPTIONS: tuple[Hook, ...] = (
    Hook(
        target=f"{_ARGUMENTS}.resolve_once",
        wrapper="sglang_overlay.hooks.option_hooks:resolve_arguments",
        kind=HookKind.AROUND,
        parameters=("self",),
        why="Makes --quantization fp8_block mean fp8 with the scheme block, before SGLang reads its arguments.",
        related=("sgl-project/sglang#31783",),
        remove_when=_WHEN_UPSTREAM_CHOOSES,
        elsewhere=(Place(f"{_ARGUMENTS}.__post_init__"),),
    ),
    *(
        Hook(
            target=f"{_LOADER}.{loader}.__init__",
            wrapper="sglang_overlay.hooks.option_hooks:make_loader",
            kind=HookKind.AROUND,
            parameters=("self", "load_config"),
            why="SGLang's loaders refuse keys of --model-loader-extra-config that they do not know; streamfp8 is not "
            "theirs.",
            related=("sgl-project/sglang#31783",),
            remove_when=_WHEN_UPSTREAM_CHOOSES,
        )
        for loader in ("DefaultModelLoader", "DummyModelLoader", "RunaiModelStreamerLoader", "ShardedStateLoader")
    ),
)
"""How a server's options choose schemes. Without them SGLang refuses these options."""

TELLING: tuple[Hook, ...] = (
    Hook(
        target="sglang.srt.observability.metrics_collector.SchedulerMetricsCollector.__init__",
        wrapper="sglang_overlay.load.metrics:add_gauges",
        kind=HookKind.AFTER,
        parameters=("self", "labels"),
        why="Adds what loads cost to the scheduler's own metrics, with the same labels.",
        related=_MEMORY_ISSUES,
        remove_when=_WHEN_UPSTREAM_STREAMS,
        without="What loads cost is not in /metrics.",
    ),
    Hook(
        target="sglang.srt.managers.scheduler.Scheduler.get_internal_state",
        wrapper="sglang_overlay.load.metrics:add_state",
        kind=HookKind.AFTER,
        parameters=("self", "recv_req"),
        why="Adds what loads cost, and what is served, to what /server_info tells of each scheduler.",
        related=_MEMORY_ISSUES,
        remove_when=_WHEN_UPSTREAM_STREAMS,
        without="What loads cost, and what is served, is not in /server_info.",
    ),
    Hook(
        target="sglang.srt.managers.scheduler.Scheduler.__init__",
        wrapper="sglang_overlay.load.metrics:begin_serving",
        kind=HookKind.AFTER,
        parameters=("self", "server_args"),
        why="Has all models loaded: the first checksum of what is served is computed here, outside of any load's time.",
        related=_UPDATE_ISSUES,
        remove_when=_WHEN_UPSTREAM_CHECKS,
        without="Checksums are computed only when they are asked for.",
    ),
    Hook(
        target=f"{_SESSIONS}.check_weights",
        wrapper="sglang_overlay.load.metrics:check_weights",
        kind=HookKind.AROUND,
        parameters=("self", "recv_req"),
        why="Adds an action to /weights_checker that has every rank compute checksums anew. Upstream's own hashes "
        "dequantized values, leaves out what is no parameter or buffer, and needs a GPU.",
        related=_UPDATE_ISSUES,
        remove_when=_WHEN_UPSTREAM_CHECKS,
        elsewhere=(Place(f"{_SESSIONS_BEFORE}.check_weights"),),
        without="python -m sglang_overlay compare has nobody to ask.",
    ),
)
