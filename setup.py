"""Maps the four top-level folders into one import package, so that no generic name lands in site-packages."""

from setuptools import find_packages, setup

FOLDERS = {
    "qcompile": "qcompile",
    "qcompile.passes": "passes",
    "qcompile.codegen": "codegen",
    "qcompile.targets": "targets",
}

setup(
    package_dir=FOLDERS,
    packages=[
        package
        for name, folder in FOLDERS.items()
        for package in [name, *(f"{name}.{sub}" for sub in find_packages(folder))]
    ],
    include_package_data=False,
    package_data={
        "qcompile": ["**/*.html", "**/*.txt", "**/*.css", "**/*.cc"],
        "qcompile.targets": ["**/*.json"],
        "qcompile.codegen": ["**/*.json", "**/*.j2", "**/*.c", "**/*.cu", "**/*.v", "**/*.h"],
    },
)
