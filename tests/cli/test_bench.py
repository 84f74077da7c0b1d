"""`moshpitd bench codecs`: what it measures of a machine and of a file. How fast is nobody's promise here."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.cli.conftest import Moshpitd


def test_it_measures_both_halves_of_a_codec_and_a_files_error(moshpitd: Moshpitd, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    rng = np.random.default_rng(0)
    tensors = {"w": rng.normal(1, 1e-3, (300, 1000)).astype(np.float32), "b": np.full(1000, 7.7, np.float16)}
    save_file(tensors, path)
    done = moshpitd("bench", "codecs", "--codec", "flash4-8", "--codec", "float32", "--file", path, "--json")
    assert done.returncode == 0, done.stderr
    contributions, averages, lossless = json.loads(done.stdout)["codecs"]
    assert [each["half"] for each in (contributions, averages, lossless)] == ["contributions", "averages", "both"]
    assert contributions["codec"] == averages["codec"] == "flash4-8"
    assert contributions["normal"]["bits_per_element"] == pytest.approx(4.25, rel=0.01)
    assert averages["normal"]["relative_error"] == pytest.approx(0.0059, rel=0.03)
    assert lossless["normal"] == {"bits_per_element": 32.0, "relative_error": 0.0}
    assert lossless["file"]["bits_per_element"] == pytest.approx(32 - 16 * 1000 / 301_000)
    # The values are alike: little is lost of their norm.
    assert 0 < averages["file"]["relative_error"] < contributions["file"]["relative_error"] < 0.001
    assert all(each["encode_gb_s"] > 0 and each["decode_gb_s"] > 0 for each in (contributions, averages, lossless))


def test_people_get_a_table(moshpitd: Moshpitd) -> None:
    done = moshpitd("bench", "codecs", "--codec", "flash8:128", "--codec", "flash2:32+spikes")
    assert done.returncode == 0, done.stderr
    rows = [line.split()[:2] for line in done.stdout.splitlines()]
    assert ["flash8", "8.25"] in rows and ["flash2:32+spikes", "4.50"] in rows


def test_anchored_codes_are_measured_one_percent_from_their_anchor(moshpitd: Moshpitd) -> None:
    done = moshpitd("bench", "codecs", "--codec", "flash4", "--codec", "flash4+anchored", "--json")
    assert done.returncode == 0, done.stderr
    plain, anchored = (each["normal"] for each in json.loads(done.stdout)["codecs"])
    assert anchored["relative_error"] == pytest.approx(0.01 * plain["relative_error"], rel=0.05)
    assert anchored["bits_per_element"] == pytest.approx(plain["bits_per_element"], rel=1e-3)


def test_what_is_not_there_is_named(moshpitd: Moshpitd, tmp_path: Path) -> None:
    unknown = moshpitd("bench", "codecs", "--codec", "flash9")
    assert unknown.returncode == 2 and "did you mean 'flash8'?" in unknown.stderr
    missing = moshpitd("bench", "codecs", "--file", tmp_path / "missing.safetensors")
    assert missing.returncode == 1 and "missing.safetensors cannot be read" in missing.stderr
