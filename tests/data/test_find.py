import pytest

from vlm_jax.data import open_source
from vlm_jax.data.find import find_data_set, full_name
from vlm_jax.errors import UserError


@pytest.fixture
def foreign(tmp_path):
    """Directories as TFDS leaves them, of data sets that are not ours."""
    for name in (
        "cifar10/3.0.2",
        "cifar10/3.0.10",
        "cifar10/incomplete.ABCDEF_4.0.0",
        "coco_captions/2014/1.1.0",
        "imagenet_resized/8x8/0.1.0",
        "imagenet_resized/32x32/0.1.0",
    ):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "dataset_info.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "directory"),
    [
        ("cifar10", "cifar10/3.0.10"),  # the newest, and 10 > 2
        ("cifar10:3.0.2", "cifar10/3.0.2"),
        ("coco_captions", "coco_captions/2014/1.1.0"),
        ("coco_captions:1.1.0", "coco_captions/2014/1.1.0"),
        ("coco_captions/2014:1.1.0", "coco_captions/2014/1.1.0"),
        ("imagenet_resized/32x32", "imagenet_resized/32x32/0.1.0"),
    ],
)
def test_foreign_names(foreign, name, directory):
    assert find_data_set(name, foreign) == foreign / directory
    assert find_data_set(full_name(foreign / directory, foreign), foreign) == foreign / directory


@pytest.mark.parametrize(
    ("name", "full"),
    [("easy_vqa", "easy_vqa/questions:1.0.0"), ("easy_vqa/color", "easy_vqa/color:1.0.0"), ("digits", "digits:1.0.0")],
)
def test_our_own_have_versions_too(data_dir, name, full):
    directory = find_data_set(name, data_dir)
    assert full_name(directory, data_dir) == full
    assert find_data_set(full, data_dir) == directory


def test_another_version_of_ours_is_found_where_it_was_prepared(tmp_path):
    (tmp_path / "digits" / "0.9.0").mkdir(parents=True)
    (tmp_path / "digits" / "0.9.0" / "dataset_info.json").write_text("{}")
    assert find_data_set("digits:0.9.0", tmp_path) == tmp_path / "digits" / "0.9.0"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifra10", r"no data set 'cifra10': did you mean one of .*'cifar10'"),
        ("openmojis", r"no data set 'openmojis': did you mean one of .*'openmoji'"),
        ("qqqqqq", r"no data set 'qqqqqq': did you mean one of \['openmoji', .*'cifar10:3\.0\.2'"),
        ("", r"no data set '': did you mean one of \['openmoji'"),
        ("../cifar10", r"no data set '\.\./cifar10'"),
        (
            "openmoji:2.0.0",
            r"openmoji:2\.0\.0 is not prepared in .*, and this vlm_jax makes openmoji:1\.0\.0: choose that",
        ),
        (
            "easy_vqa/colour",
            r"no data set 'easy_vqa/colour': those .* are \['easy_vqa/questions', 'easy_vqa/dialogues', ",
        ),
        ("imagenet_resized", r"several configurations in .*: choose one of \['imagenet_resized/32x32', 'imagenet_"),
        (
            "fashion_mnist",
            r"fashion_mnist is not prepared in .*: run `pip install -e '\.\[prepare\]'` and "
            r"`tfds build fashion_mnist --data_dir=/.* --file_format=array_record`",
        ),
        (
            "cifar10:4.0.0",
            r"cifar10:4\.0\.0 is not prepared in .*, which has \['cifar10:3\.0\.10', .*tfds build cifar10",
        ),
    ],
)
def test_what_cannot_be_found(foreign, name, message):
    with pytest.raises(UserError, match=message):
        find_data_set(name, foreign)


def test_unreadable_description(foreign):
    with pytest.raises(
        UserError, match=r"the description of cifar10 in .*/cifar10/3\.0\.10 .*: move that .*tfds build"
    ):
        open_source("cifar10", "train", foreign)
