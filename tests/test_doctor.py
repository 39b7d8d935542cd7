import re
from importlib import metadata

import pytest
import torch

import sgc
from sgc import doctor


def lines_of(report, stage):
    return [line.split(maxsplit=2) for line in report.splitlines() if line.startswith(f"  {stage} ")]


def test_the_report_names_every_stage_of_every_device_with_its_path_and_reason(monkeypatch):
    monkeypatch.delenv("SGC_KERNELS", raising=False)
    report = doctor.report()
    for stage in doctor.STAGES:
        found = lines_of(report, stage)
        assert len(found) == 1 + torch.cuda.device_count(), stage
        assert found[0][1] in ("torch", "numba")
        assert len(found[0][2]) > len(doctor.STAGES[stage]) + 5
    assert re.search(r"^cpu: .*thread", report, re.M)


def test_the_report_has_the_versions_and_says_what_is_missing(monkeypatch):
    def version(package, real=metadata.version):
        if package == "deepspeed":
            raise metadata.PackageNotFoundError
        return "9.8.7" if package == "triton" else real(package)

    monkeypatch.setattr(metadata, "version", version)
    report = doctor.report()
    assert f"sgc {sgc.__version__}" in report
    assert f"torch {torch.__version__}" in report
    assert "triton 9.8.7" in report
    assert re.search(r"^not installed: .*deepspeed", report, re.M)


def test_the_report_says_that_the_environment_decided(monkeypatch):
    monkeypatch.setenv("SGC_KERNELS", "torch")
    report = doctor.report()
    assert "SGC_KERNELS: torch" in report
    assert all(path == "torch" and "SGC_KERNELS=torch" in why for _, path, why in lines_of(report, "apply"))


def test_what_is_refused_is_reported_and_not_raised(monkeypatch):
    monkeypatch.setenv("SGC_KERNELS", "fortran")
    (_, path, why), *_ = lines_of(doctor.report(), "encode")
    assert path == "refused"
    assert "fortran" in why
    monkeypatch.setenv("SGC_KERNELS", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    (_, path, why), *_ = lines_of(doctor.report(), "encode")
    assert path == "refused"
    assert "TRITON_INTERPRET=1" in why


def test_kernels_are_tried_and_a_wrong_one_is_found(monkeypatch):
    pytest.importorskip("triton", reason="the kernels need Triton")
    from sgc.backends.triton import batch

    monkeypatch.setenv("SGC_KERNELS", "triton")
    assert re.search(r"kernels and torch agree, (\de-0[78]|0e\+00) of an update apart", doctor.report())
    real = batch.Batch.update
    monkeypatch.setattr(batch.Batch, "update", lambda self, e: real(self, [e[0]._replace(lr=2 * e[0].lr)]))
    assert "kernels and torch DISAGREE, 1e+00" in doctor.report()

    def broken(self, entries):
        raise OSError("no ptxas")

    monkeypatch.setattr(batch.Batch, "update", broken)
    assert "FAILED: OSError: no ptxas" in doctor.report()
