# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest

from sglang_overlay.errors import SettingsError
from sglang_overlay.settings import Mode, Settings, load_settings


@pytest.mark.parametrize(
    ("text", "mode"),
    [("", Mode.ON), ("1", Mode.ON), ("0", Mode.OFF), ("require", Mode.REQUIRE), (" Require ", Mode.REQUIRE)],
)
def test_switch_takes_its_three_values_and_is_on_without_one(text, mode):
    assert load_settings({"SGLANG_STREAMFP8": text}).mode is mode


@pytest.mark.parametrize("text", ["2", "true", "on", "off", "required"])
def test_any_other_value_is_an_error_that_lists_the_valid_ones(text):
    with pytest.raises(SettingsError, match=rf"'{text}'.*=0, .*=1, .*=require"):
        load_settings({"SGLANG_STREAMFP8": text})


def test_setting_that_does_not_exist_is_an_error_that_lists_those_that_do():
    with pytest.raises(SettingsError, match=r"no setting SGLANG_STREAMFP8_REPORTS\. .*SGLANG_STREAMFP8_REPORT,"):
        load_settings({"SGLANG_STREAMFP8_REPORTS": "reports"})
    assert load_settings({"_SGLANG_STREAMFP8_COMPLETE": "bash_source", "SGLANG_STREAM": "1"}) == Settings()


@pytest.mark.parametrize("service", ["SGLANG_STREAMFP8", "SGLANG_STREAMFP8_QWEN3"])
def test_what_kubernetes_sets_for_a_service_is_no_setting(service):
    """Names and values are those of a pod whose namespace has such a service (Kubernetes' page on services)."""
    links = {
        f"{service}_SERVICE_HOST": "10.0.0.11",
        f"{service}_SERVICE_PORT": "30000",
        f"{service}_SERVICE_PORT_HTTP": "30000",
        f"{service}_PORT": "tcp://10.0.0.11:30000",
        f"{service}_PORT_30000_TCP": "tcp://10.0.0.11:30000",
        f"{service}_PORT_30000_TCP_PROTO": "tcp",
        f"{service}_PORT_30000_TCP_PORT": "30000",
        f"{service}_PORT_30000_TCP_ADDR": "10.0.0.11",
    }
    assert load_settings(links) == Settings()
    assert load_settings({**links, "SGLANG_STREAMFP8": "require"}).mode is Mode.REQUIRE
    with pytest.raises(SettingsError, match="no setting SGLANG_STREAMFP8_REPORTS"):
        load_settings({**links, "SGLANG_STREAMFP8_REPORTS": "reports"})
    del links[f"{service}_SERVICE_HOST"]
    with pytest.raises(SettingsError, match=f"no setting {service}_PORT"):
        load_settings(links)


def test_reports_are_written_only_where_a_folder_is_given():
    assert load_settings({}) == Settings(mode=Mode.ON, report_folder=None)
    assert load_settings({"SGLANG_STREAMFP8_REPORT": " "}).report_folder is None
    assert load_settings({"SGLANG_STREAMFP8_REPORT": "reports"}).report_folder == Path("reports")


def test_missing_weights_are_allowed_only_where_that_is_asked_for():
    assert not load_settings({}).allow_missing
    assert not load_settings({"SGLANG_STREAMFP8_ALLOW_MISSING": "0"}).allow_missing
    assert load_settings({"SGLANG_STREAMFP8_ALLOW_MISSING": "1"}).allow_missing
    with pytest.raises(SettingsError, match=r"SGLANG_STREAMFP8_ALLOW_MISSING='yes'.*=0, .*=1"):
        load_settings({"SGLANG_STREAMFP8_ALLOW_MISSING": "yes"})


def test_pinned_ring_is_off_unless_asked_for():
    assert not load_settings({}).pinned_ring
    assert load_settings({"SGLANG_STREAMFP8_PINNED_RING": "1"}).pinned_ring
    with pytest.raises(SettingsError, match=r"SGLANG_STREAMFP8_PINNED_RING='on'.*=0, .*=1"):
        load_settings({"SGLANG_STREAMFP8_PINNED_RING": "on"})


def test_loader_config_chooses_a_scheme_as_the_variable_does():
    by_variable = load_settings({"SGLANG_STREAMFP8_SCHEME": "block"})
    by_option = load_settings({}, {"num_threads": 2, "streamfp8": {"scheme": "block"}})
    assert by_option.schemes == by_variable.schemes
    assert by_variable.required_by == "SGLANG_STREAMFP8_SCHEME=block"
    assert by_option.required_by == "--quantization fp8_block"
    assert load_settings({}, {"num_threads": 2}) == load_settings({})
    by_kind = load_settings({}, {"streamfp8": {"scheme": {"moe": "int8"}}})
    assert by_kind.required_by == "--model-loader-extra-config streamfp8.scheme=linear stock, moe int8"


@pytest.mark.parametrize("given", ["block", {}, {"scheme": "block", "linear": "channel"}])
def test_part_of_the_loader_config_has_one_key(given):
    with pytest.raises(SettingsError, match=r'"streamfp8" in --model-loader-extra-config.*one key is "scheme"'):
        load_settings({}, {"streamfp8": given})


def test_two_choices_of_schemes_have_to_agree():
    chosen = {"streamfp8": {"scheme": "block"}}
    assert load_settings({"SGLANG_STREAMFP8_SCHEME": "block"}, chosen).schemes.names == {"block"}
    for other in ("channel", "stock"):
        with pytest.raises(SettingsError, match=f"fp8_block and SGLANG_STREAMFP8_SCHEME={other} choose different"):
            load_settings({"SGLANG_STREAMFP8_SCHEME": other}, chosen)
