import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_has_the_stages_of_the_script():
    script = ["bash", str(ROOT / "scripts" / "gpu_check.sh"), "--list"]
    listed = subprocess.run(script, capture_output=True, text=True, check=True).stdout
    page = (ROOT / "docs" / "trust_without_a_gpu.md").read_text()
    start, end = "<!-- scripts/gpu_check.sh --list -->\n", "<!-- end -->"
    assert page.partition(start)[2].partition(end)[0] == listed
