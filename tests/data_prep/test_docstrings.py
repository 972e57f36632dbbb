"""Documents out of the docstrings of installed packages."""

import pytest

from data_prep.docstrings import is_held_out, read_docstrings


@pytest.fixture
def package(tmp_path, monkeypatch):
    folder = tmp_path / "documented_package"
    folder.mkdir()
    (folder / "__init__.py").write_text('"""About the package."""\nraise RuntimeError("imported")\n')
    (folder / "module.py").write_text(
        'def second():\n    """Of a function."""\n\n\nclass Third:\n    """Of a class."""\n\n'
        '    def method(self):\n        """Of a method."""\n'
    )
    (folder / "same.py").write_text('"""About the package."""\n')
    (folder / "silent.py").write_text("x = 1\n")
    (folder / "template.py").write_text("def {{ name }}:\n")
    monkeypatch.syspath_prepend(tmp_path)
    return folder.name


def test_docstrings_of_a_module_are_one_document_and_nothing_is_imported(package):
    assert list(read_docstrings([package], show_progress=False)) == [
        {"id": package, "text": "About the package."},
        {"id": f"{package}.module", "text": "Of a function.\n\nOf a class.\n\nOf a method."},
    ]


def test_package_that_is_not_installed_is_refused_by_name():
    with pytest.raises(ValueError, match="no package named 'no_such_package'"):
        list(read_docstrings(["no_such_package"]))


def test_one_document_in_32_is_held_out_in_every_version():
    names = [f"package.module_{i}" for i in range(6400)]
    held_out = [name for name in names if is_held_out(name)]
    assert abs(len(held_out) - 200) < 4 * 200**0.5
    # Models that were published rely on the split: it must never change.
    assert is_held_out("transformers.models.bert.modeling_bert") is False
    assert [name for name in names[:100] if is_held_out(name)] == [f"package.module_{i}" for i in (29, 37, 59, 69, 74)]
