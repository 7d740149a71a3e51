"""The build backend of pyproject.toml: `pip install -e .` in a clone brings what the scripts need.

The scripts run from the clone and import one another by plain names (model, train, ...), which would clash with other
packages if they were installed. So a plain `pip install .` is refused instead of installing nothing.
"""

from setuptools.build_meta import build_editable, get_requires_for_build_editable, prepare_metadata_for_build_editable

__all__ = ["build_editable", "build_wheel", "get_requires_for_build_editable", "get_requires_for_build_wheel",
           "prepare_metadata_for_build_editable"]


def get_requires_for_build_wheel(config_settings=None):
    raise SystemExit("nanoRRT runs from its clone and installs no modules: git clone it, then `pip install -e .` there "
                     "brings what it needs")


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    get_requires_for_build_wheel()
