# SPDX-License-Identifier: Apache-2.0
"""What is copied is what the configuration names, and nothing else is removed:
disks, mounts and trees that are not what they seem, before a migration and amid it."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import support
from anypair import Pair, any_pair, make_disk


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    with any_pair(tmp_path) as made:
        yield made


def umount(point: Path) -> None:
    support.run("umount", point)


@contextlib.contextmanager
def mounted(point: Path, *words: object) -> Iterator[None]:
    """Something more on a mount point."""
    support.run("mount", *words, point)
    try:
        yield
    finally:
        subprocess.run(["umount", str(point)], capture_output=True, check=False)


def other_image(pair: Pair, name: str = "other.img") -> Path:
    image = pair.a / name
    make_disk(image)
    return image


# ---- before: each leaves the container as it is, and names both


@contextlib.contextmanager
def another_image(pair: Pair) -> Iterator[tuple[str, ...]]:
    other = other_image(pair)
    with mounted(pair.a / "one", "-o", "loop", other):
        yield (str(other), str(pair.a / "one.img"))


@contextlib.contextmanager
def a_tmpfs(pair: Pair) -> Iterator[tuple[str, ...]]:
    with mounted(pair.a / "two", "-t", "tmpfs", "none"):
        yield ("none (tmpfs)", str(pair.a / "two.img"))


@contextlib.contextmanager
def the_other_disk(pair: Pair) -> Iterator[tuple[str, ...]]:
    with mounted(pair.a / "two", "--bind", pair.a / "one"):
        yield (str(pair.a / "one.img"), f"{pair.a}/two too")


@contextlib.contextmanager
def a_folder_above_hidden(pair: Pair) -> Iterator[tuple[str, ...]]:
    folder = pair.a / "two"
    text = (pair.a / "migrate.toml").read_text()
    (pair.a / "above").mkdir()
    (pair.a / "above/two").mkdir()
    (pair.a / "migrate.toml").write_text(
        text.replace(f'mount = "{folder}"', f'mount = "{pair.a}/above/two"')
    )
    with (
        mounted(pair.a / "above/two", "--bind", folder),
        mounted(pair.a / "above", "-t", "tmpfs", "none"),
    ):
        yield ("is not mounted on", str(pair.a / "two.img"))
    (pair.a / "migrate.toml").write_text(text)


@contextlib.contextmanager
def a_new_file_of_that_name(pair: Pair) -> Iterator[tuple[str, ...]]:
    image, aside = pair.a / "one.img", pair.a / "aside.img"
    image.rename(aside)
    make_disk(image)
    try:
        yield (str(aside), str(image))
    finally:
        aside.rename(image)


@contextlib.contextmanager
def a_mount_over_the_image(pair: Pair) -> Iterator[tuple[str, ...]]:
    with mounted(pair.a / "one.img", "--bind", other_image(pair)):
        yield (str(pair.a / "one.img"), "another file that had this name")


@contextlib.contextmanager
def mounted_twice(pair: Pair) -> Iterator[tuple[str, ...]]:
    second = pair.a / "second"
    second.mkdir()
    with mounted(second, "--bind", pair.a / "one"):
        yield (str(second), str(pair.a / "one.img"))
    second.rmdir()


@contextlib.contextmanager
def something_within(pair: Pair) -> Iterator[tuple[str, ...]]:
    (pair.a / "one/sub").mkdir()
    with mounted(pair.a / "one/sub", "-t", "tmpfs", "none"):
        yield (str(pair.a / "one/sub"), str(pair.a / "one.img"))


@contextlib.contextmanager
def another_kind_of_file_system(pair: Pair) -> Iterator[tuple[str, ...]]:
    config = pair.a / "migrate.toml"
    text = config.read_text()
    config.write_text(text.replace('fstype = "ext4"', 'fstype = "xfs"', 1))
    yield ("is ext4, and not xfs", str(pair.a / "one"))
    config.write_text(text)


@contextlib.contextmanager
def an_image_that_grew(pair: Pair) -> Iterator[tuple[str, ...]]:
    image = pair.a / "one.img"
    size = image.stat().st_size
    with image.open("r+b") as f:
        f.truncate(size + (4 << 20))
    yield (str(size), str(size + (4 << 20)), "losetup")
    with image.open("r+b") as f:
        f.truncate(size)


OTHERS: dict[str, Callable[[Pair], contextlib.AbstractContextManager[tuple[str, ...]]]] = {
    "another image is mounted over it": another_image,
    "a tmpfs is mounted over it": a_tmpfs,
    "the other disk is mounted over it": the_other_disk,
    "a file system hides the folder above it": a_folder_above_hidden,
    "the image is a new file of that name": a_new_file_of_that_name,
    "another image is mounted over its name": a_mount_over_the_image,
    "it is mounted at a second place": mounted_twice,
    "something is mounted within it": something_within,
    "it has another kind of file system": another_kind_of_file_system,
    "the image has grown, its device has not": an_image_that_grew,
}


def test_a_disk_that_is_not_what_is_configured_is_refused(pair: Pair) -> None:
    """Each of OTHERS, live and not, on one container that runs through all of it."""
    for what, made in OTHERS.items():
        for live in (["--live"], []):
            with made(pair) as names:
                images = {p: p.stat().st_ino for p in pair.a.glob("*.img")}
                done = pair.migrate(pair.a, *live)
                assert done.returncode == 15, (what, live, done.stderr)
                assert all(name in done.stderr for name in names), (what, done.stderr)
                assert {p: p.stat().st_ino for p in pair.a.glob("*.img")} == images
                assert not (pair.b / "one.img").exists()
                assert pair.step(pair.a, "status") == "running"
            for leftover in (pair.a / "other.img", pair.a / "above"):
                if leftover.is_dir():
                    (leftover / "two").rmdir()
                    leftover.rmdir()
                leftover.unlink(missing_ok=True)
            if (pair.a / "one/sub").exists():
                (pair.a / "one/sub").rmdir()
    assert pair.migrate(pair.a, "--live").returncode == 0
    pair.runs_only_on(pair.b)


def stop(pair: Pair) -> None:
    """The container, its disks unmounted."""
    pair.step(pair.a, "stop")
    for disk in ("one", "two"):
        umount(pair.a / disk)
    # A loop device goes a moment after its last user.
    command = ("losetup", "-nO", "BACK-FILE")
    support.wait_until(lambda: str(pair.a) not in support.run(*command), "no loop device is left")


def test_a_stopped_container_moves_with_its_disks_mounted_or_not_but_not_with_others(
    pair: Pair,
) -> None:
    numbers = (pair.a / "one/numbers").read_text()
    stop(pair)
    other = other_image(pair)
    with mounted(pair.a / "one", "-o", "loop", other):
        done = pair.migrate(pair.a)
        assert (done.returncode, str(other) in done.stderr) == (15, True), done.stderr
    elsewhere = pair.a / "elsewhere"
    elsewhere.mkdir()
    with mounted(elsewhere, "-o", "loop", pair.a / "two.img"):
        done = pair.migrate(pair.a)
        assert (done.returncode, str(elsewhere) in done.stderr) == (15, True), done.stderr
    support.run("mount", "-o", "loop", *pair.disk("one"))
    done = pair.migrate(pair.a)
    assert done.returncode == 0, done.stderr
    assert not (pair.a / "one.img").exists() and not (pair.a / "two.img").exists()
    assert other.exists()
    with mounted(pair.a / "one", "-o", "loop", pair.b / "one.img"):
        assert (pair.a / "one/numbers").read_text().startswith(numbers)


def test_a_disk_that_is_mounted_from_a_part_of_the_image_is_refused(pair: Pair) -> None:
    stop(pair)
    with (pair.a / "one.img").open("r+b") as f:
        f.truncate(64 << 20)
    offset = 32 << 20
    support.run("mkfs.ext4", "-q", "-F", "-E", f"offset={offset}", pair.a / "one.img", "8M")
    with mounted(pair.a / "one", "-o", f"loop,offset={offset}", pair.a / "one.img"):
        done = pair.migrate(pair.a)
    assert (done.returncode, f"from {offset} on" in done.stderr) == (15, True), done.stderr
    assert (pair.a / "one.img").exists()


# ---- amid it: what took a place is not removed


def reached(host: Path, step: str) -> None:
    support.wait_until((host / f"{step}-reached").exists, f"{step} is reached", 40)
    (host / f"{step}-reached").unlink()


@contextlib.contextmanager
def amid(pair: Pair, option: str = "--live") -> Iterator[Callable[[], tuple[int, str]]]:
    """A migration that stands before the source's container is ended."""
    gate = pair.a / "kill-waits"
    gate.touch()
    with pair.moving(pair.a, option) as moving:

        def go_on() -> tuple[int, str]:
            gate.unlink()
            said = moving.communicate(timeout=60)[0]
            return moving.returncode, said

        reached(pair.a, "kill")
        yield go_on


def test_an_image_that_took_the_copied_one_s_place_is_not_removed(pair: Pair) -> None:
    image, aside = pair.a / "one.img", pair.a / "aside"
    with amid(pair) as go_on:
        image.rename(aside)
        image.write_bytes(b"precious")
        code, said = go_on()
    assert code == 8, said
    assert f"{image} is not what was copied" in said
    assert image.read_bytes() == b"precious"
    assert (pair.a / "two.img").exists()
    assert pair.migrate(pair.a, "--recover").returncode == 8
    assert image.read_bytes() == b"precious"
    image.unlink()
    aside.rename(image)
    done = pair.migrate(pair.a, "--recover")
    assert done.returncode == 0, done.stderr
    assert not image.exists()
    pair.runs_only_on(pair.b)


def test_what_hides_a_disk_at_the_end_is_not_unmounted_and_the_disk_stays(pair: Pair) -> None:
    with amid(pair) as go_on:
        support.run("mount", "-t", "tmpfs", "none", pair.a / "two")
        (pair.a / "two/precious").touch()
        code, said = go_on()
    assert code == 8, said
    assert str(pair.a / "two") in said and "unmount it" in said
    assert (pair.a / "two/precious").exists()
    assert (pair.a / "one.img").exists() and (pair.a / "two.img").exists()
    umount(pair.a / "two")
    done = pair.migrate(pair.a, "--recover")
    assert done.returncode == 0, done.stderr
    pair.runs_only_on(pair.b)


# ---- directories


@pytest.fixture
def tree(pair: Pair) -> Path:
    """The container has one, too."""
    support.needs("rsync")
    for host in (pair.a, pair.b):
        with (host / "migrate.toml").open("a") as f:
            f.write(f'[[container.box.tree]]\npath = "{host}/tree"\n')
    (pair.a / "tree").mkdir()
    (pair.a / "tree/file").write_text("the tree's")
    return pair.a / "tree"


def test_a_directory_with_a_bind_mount_below_or_two_mounts_over_it_is_refused(
    pair: Pair, tree: Path
) -> None:
    (tree / "sub").mkdir()
    (pair.a / "elsewhere").mkdir()
    (pair.a / "elsewhere/file").touch()
    # The same file system: device numbers do not tell.
    with mounted(tree / "sub", "--bind", pair.a / "elsewhere"):
        done = pair.migrate(pair.a, "--live")
        assert (done.returncode, str(tree / "sub") in done.stderr) == (15, True), done.stderr
    with mounted(tree, "-t", "tmpfs", "first"), mounted(tree, "-t", "tmpfs", "second"):
        done = pair.migrate(pair.a, "--live")
        assert done.returncode == 15, done.stderr
        assert "second" in done.stderr and "first" in done.stderr
    assert (pair.a / "elsewhere/file").exists() and (tree / "file").exists()
    assert pair.step(pair.a, "status") == "running"


def test_a_directory_that_took_the_copied_one_s_place_is_not_emptied(
    pair: Pair, tree: Path
) -> None:
    with amid(pair) as go_on:
        tree.rename(pair.a / "aside")
        tree.mkdir()
        (tree / "precious").touch()
        code, said = go_on()
    assert code == 8, said
    assert f"{tree} is not what was copied" in said
    assert (tree / "precious").exists() and (pair.a / "aside/file").exists()
    assert (pair.b / "tree/file").read_text() == "the tree's"
    (tree / "precious").unlink()
    tree.rmdir()
    assert pair.migrate(pair.a, "--recover").returncode == 0
    assert (pair.a / "aside/file").exists()


# ---- file systems


@pytest.mark.parametrize(
    ("fstype", "options"),
    [
        ("ext4", 'rw,nofail,_netdev,user,exec,x-systemd.automount,comment="a,b",errors=remount-ro'),
        ("xfs", "nouuid,noatime,auto,nouser,x-mount.mkdir"),
    ],
)
def test_disks_of_each_file_system_move_with_options_of_an_fstab(
    tmp_path: Path, fstype: str, options: str
) -> None:
    with any_pair(tmp_path, fstype, options) as pair:
        done = pair.migrate(pair.a, "--live")
        assert done.returncode == 0, done.stderr
        pair.runs_only_on(pair.b)


def test_a_btrfs_moves_with_the_subvolume_that_is_configured(tmp_path: Path) -> None:
    """Live only checked: one kernel takes no second btrfs of the same UUID for sure."""
    support.needs("btrfs")
    with any_pair(tmp_path, "btrfs", "noatime,owner,noauto") as pair:
        done = pair.migrate(pair.a, "--live", "--check-only")
        assert done.returncode == 0, done.stderr
        pair.step(pair.a, "stop")
        numbers = (pair.a / "one/numbers").read_text()
        support.run("btrfs", "subvolume", "create", pair.a / "one/sub")
        (pair.a / "one/sub/numbers").write_text(numbers)
        umount(pair.a / "one")
        support.run("mount", "-o", "loop,subvol=sub", *pair.disk("one"))
        pair.step(pair.a, "start")
        done = pair.migrate(pair.a, "--live")
        assert done.returncode == 15, done.stderr
        assert 'options = "subvol=/sub"' in done.stderr
        for host in (pair.a, pair.b):
            config = host / "migrate.toml"
            config.write_text(config.read_text().replace("noatime", "noatime,subvol=sub", 1))
        done = pair.migrate(pair.a, "--live", "--check-only")
        assert done.returncode == 0, done.stderr
        stop(pair)
        done = pair.migrate(pair.a)
        assert done.returncode == 0, done.stderr
        assert (pair.b / "one/numbers").read_text().startswith(numbers)


def test_a_btrfs_on_two_devices_is_refused_with_both_names(tmp_path: Path) -> None:
    with any_pair(tmp_path, "btrfs", "noatime") as pair:
        support.needs("btrfs")
        second = pair.a / "second.img"
        with second.open("wb") as f:
            f.truncate(128 << 20)
        loop = support.run("losetup", "--find", "--show", second).strip()
        support.run("btrfs", "device", "add", "-f", loop, pair.a / "one")
        done = pair.migrate(pair.a, "--live")
        assert done.returncode == 15, done.stderr
        assert loop.removeprefix("/dev/") in done.stderr and "several devices" in done.stderr
        assert pair.step(pair.a, "status") == "running"
