# SPDX-License-Identifier: Apache-2.0
"""Schemes as options of the server: ``--quantization fp8_block``, and a key of ``--model-loader-extra-config``.

SGLang asks in many places whether ``quantization`` is ``fp8``. So a server that is given ``fp8_block`` becomes one with
``fp8`` before anything reads its arguments, and the scheme moves to the loader's arguments. From there it reaches every
process that loads a model, Ray's actors too. A process that loads no plugins refuses it: SGLang's loaders accept no
keys but their own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

from sglang_overlay.errors import SettingsError
from sglang_overlay.schemes.choice import FLAGS
from sglang_overlay.settings import LOADER_KEY, load_settings

ARGUMENTS_MODULE = "sglang.srt.server_args"
_TARGET, _DRAFT = "quantization", "speculative_draft_model_quantization"


def add_choices(server_args: ModuleType) -> None:
    """Have ``--quantization`` take ``FLAGS``, in the way SGLang offers to plugins.

    Args:
        server_args: SGLang's module of that name.
    """
    server_args.add_quantization_method_choices(list(FLAGS))


def resolve_arguments(original: Callable[..., Any], arguments: Any, *args: Any, **kwargs: Any) -> Any:
    """Around ``ServerArgs.resolve_once``, or before 0.5.19 ``ServerArgs.__post_init__``.

    Raises:
        SettingsError: the target, its draft, the environment and the loader's arguments choose different schemes.
    """
    given = {name: getattr(arguments, name) for name in (_TARGET, _DRAFT) if getattr(arguments, name) in FLAGS}
    if given:
        _choose(arguments, given)
    return original(arguments, *args, **kwargs)


def _choose(arguments: Any, given: dict[str, str]) -> None:
    flag = arguments.quantization
    if set(given.values()) != {flag}:
        raise SettingsError(
            f"--speculative-draft-model-quantization {given[_DRAFT]} belongs with --quantization {given[_DRAFT]}: "
            "a model and its draft have the same scheme"
        )
    config = arguments.model_loader_extra_config or {}
    config = json.loads(config) if isinstance(config, str) else dict(config)
    if config.setdefault(LOADER_KEY, {"scheme": FLAGS[flag]}) != {"scheme": FLAGS[flag]}:
        raise SettingsError(
            f"--quantization {flag} and {config[LOADER_KEY]} choose different schemes. Give one of them."
        )
    load_settings(os.environ, config)
    for name in given:
        setattr(arguments, name, "fp8")
    arguments.model_loader_extra_config = json.dumps(config)


def make_loader(original: Callable[..., None], loader: Any, load_config: Any) -> None:
    """Around ``__init__`` of loaders that are streamed: they refuse keys that they do not know."""
    given = load_config.model_loader_extra_config or {}
    ours = {key: value for key, value in given.items() if key == LOADER_KEY}
    load_config.model_loader_extra_config = {key: value for key, value in given.items() if key != LOADER_KEY}
    original(loader, load_config)
    load_config.model_loader_extra_config = {**load_config.model_loader_extra_config, **ours}
