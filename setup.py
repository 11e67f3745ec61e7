"""Build the package `cai_course` from settings.ini; the course's data and its chapters travel in the wheel as `cai_course/_assets/`."""
import shlex
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
ASSETS = ("data", "constitutions")
CHAPTERS = "nbs/[0-9][0-9]_*.ipynb"  # what `cai-course start` copies; practice and tools are in the library already

parser = ConfigParser(delimiters=["="])
parser.read(HERE / "settings.ini", encoding="utf-8")
config = parser["DEFAULT"]


class build_with_assets(build_py):
    """Copy `data/`, `constitutions/` and the chapters beside the modules. An editable install reads them where they are."""

    def _assets(self):
        found = [source for name in ASSETS for source in sorted((HERE / name).rglob("*"))] + sorted(HERE.glob(CHAPTERS))
        for source in found:
            parts = source.relative_to(HERE).parts
            if source.is_file() and not any(part.startswith((".", "__pycache__")) for part in parts):
                yield source, Path(self.build_lib, config["lib_path"], "_assets", *parts)

    def run(self):
        super().run()
        if not self.editable_mode:
            for source, target in self._assets():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)

    def get_outputs(self, include_bytecode=True):
        outputs = super().get_outputs(include_bytecode)
        return outputs if self.editable_mode else outputs + [str(target) for _, target in self._assets()]


setup(
    name=config["lib_name"],
    version=config["version"],
    description=config["description"],
    long_description=(HERE / "README.md").read_text(encoding="utf-8") if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    author=config["author"],
    author_email=config["author_email"],
    url=config["git_url"],
    license_expression="Apache-2.0",
    keywords=config["keywords"].split(),
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Education",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Natural Language :: English",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    packages=find_packages(include=[config["lib_path"], config["lib_path"] + ".*"]),
    package_data={config["lib_path"]: ["py.typed"]},
    include_package_data=False,
    python_requires=">=" + config["min_python"],
    install_requires=shlex.split(config["requirements"]),
    extras_require={
        "dev": shlex.split(config["dev_requirements"]) + shlex.split(config["docs_requirements"]),
        "docs": shlex.split(config["docs_requirements"]),
    },
    entry_points={
        "console_scripts": ["cai-course = cai_course.cli:main"],
        "nbdev": ["cai_course = cai_course._modidx:d"],
    },
    cmdclass={"build_py": build_with_assets},
    zip_safe=False,
)
