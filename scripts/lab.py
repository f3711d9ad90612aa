"""JupyterLab's settings in `make lab`: what is in notebooks/ is saved as git has it.

Outputs stay in the browser. A notebook that is saved in another folder keeps them.
"""

from typing import Any


def without_outputs(model: dict[str, Any], path: str, **_: Any) -> None:
    """The hook before a file is saved, in place."""
    if model["type"] != "notebook" or not path.lstrip("/").startswith("notebooks/"):
        return
    kept = {"kernelspec": model["content"]["metadata"]["kernelspec"]}
    model["content"]["metadata"] = kept | {"language_info": {"name": "python"}}
    for cell in model["content"]["cells"]:
        tags = cell["metadata"].get("tags")
        cell["metadata"] = {"tags": tags} if tags else {}
        if cell["cell_type"] == "code":
            cell["outputs"], cell["execution_count"] = [], None


c = get_config()  # noqa: F821 (Jupyter's)
c.LabApp.default_url = "/lab/tree/README.md"
c.FileContentsManager.pre_save_hook = without_outputs
