//! Where NCCL may lie: as the system's loader finds it, in Python environments (where `pip install` puts it), beside
//! CUDA.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// The names under which NCCL is installed; the second is a link that only development packages have.
const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];
/// The variable that names the library itself.
pub(super) const LIBRARY_VARIABLE: &str = "COGVLM_NCCL_LIBRARY";

/// Candidates in the order in which they are tried: file names for the loader, which looks into LD_LIBRARY_PATH and its
/// cache, then paths of files that exist. `get` looks up variables; `root` stands before absolute paths of the system.
pub(super) fn candidates(get: &dyn Fn(&str) -> Option<OsString>, root: &Path) -> Vec<PathBuf> {
    let get = |name: &str| get(name).filter(|value| !value.is_empty());
    // Whoever names it wants no other.
    if let Some(library) = get(LIBRARY_VARIABLE) {
        return vec![library.into()];
    }
    let system = |path: &str| root.join(path.trim_start_matches('/'));
    let mut prefixes: Vec<PathBuf> = ["VIRTUAL_ENV", "CONDA_PREFIX", "PYTHONUSERBASE"]
        .iter()
        .filter_map(|name| get(name))
        .map(PathBuf::from)
        .collect();
    prefixes.extend(get("HOME").map(|home| Path::new(&home).join(".local")));
    let paths = get("PATH").map(|paths| std::env::split_paths(&paths).collect::<Vec<_>>()).unwrap_or_default();
    for folder in &paths {
        prefixes.extend(folder.parent().map(Path::to_owned));
        // A virtual environment's python3 is a link to the one that it was made of.
        let python = folder.join("python3").canonicalize().ok();
        prefixes.extend(python.as_deref().and_then(Path::parent).and_then(Path::parent).map(Path::to_owned));
    }
    prefixes.extend(["/usr", "/usr/local", "/opt/conda"].map(system));
    let mut sites: Vec<PathBuf> =
        get("PYTHONPATH").map(|paths| std::env::split_paths(&paths).collect()).unwrap_or_default();
    for prefix in &prefixes {
        for python in pythons(&prefix.join("lib")) {
            sites.extend(["site-packages", "dist-packages"].map(|name| python.join(name)));
        }
    }
    let mut folders: Vec<PathBuf> = Vec::new();
    for site in &sites {
        folders.extend(["nvidia/nccl/lib", "nvidia/cu13/lib"].map(|name| site.join(name)));
    }
    folders.extend(get("CONDA_PREFIX").map(|prefix| Path::new(&prefix).join("lib")));
    folders.extend(["/usr/local/cuda/lib64", "/usr/local/nvidia/lib64", "/usr/local/lib"].map(system));
    let mut found: Vec<PathBuf> = NAMES.map(PathBuf::from).to_vec();
    for path in folders.iter().flat_map(|folder| NAMES.map(|name| folder.join(name))) {
        if path.is_file() && !found.contains(&path) {
            found.push(path);
        }
    }
    found
}

/// `python3`, `python3.12`, … in a `lib` folder, the newest first.
fn pythons(lib: &Path) -> Vec<PathBuf> {
    let minor = |path: &PathBuf| -> Option<u32> {
        let version = path.file_name()?.to_str()?.strip_prefix("python3")?.to_owned();
        if version.is_empty() { Some(0) } else { version.strip_prefix('.')?.trim_end_matches('t').parse().ok() }
    };
    let entries = std::fs::read_dir(lib).into_iter().flatten().flatten();
    let mut found: Vec<PathBuf> = entries.map(|entry| entry.path()).filter(|path| minor(path).is_some()).collect();
    found.sort_by_key(|path| std::cmp::Reverse(minor(path)));
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn touch(path: &Path) -> PathBuf {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, "").unwrap();
        path.to_owned()
    }

    #[test]
    fn a_named_library_is_the_only_candidate() {
        let get = |name: &str| (name == LIBRARY_VARIABLE).then(|| OsString::from("/x/libnccl.so.2"));
        assert_eq!(candidates(&get, Path::new("/")), [PathBuf::from("/x/libnccl.so.2")]);
    }

    #[test]
    fn wheels_are_found_where_pip_puts_them() {
        let dir = tempfile::TempDir::new().unwrap();
        let root = dir.path();
        let wheel = "nvidia/nccl/lib/libnccl.so.2";
        let venv = touch(&root.join("venv/lib/python3.12/site-packages").join(wheel));
        let older = touch(&root.join("venv/lib/python3.9/site-packages").join(wheel));
        let python_path = touch(&root.join("path").join(wheel));
        let user = touch(&root.join("home/.local/lib/python3.11/site-packages").join(wheel));
        let on_path = touch(&root.join("pyenv/lib/python3.10/site-packages").join(wheel));
        let debian = touch(&root.join("usr/lib/python3/dist-packages").join(wheel));
        let local = touch(&root.join("usr/local/lib/python3.10/dist-packages").join(wheel));
        let conda = touch(&root.join("conda/lib/libnccl.so"));
        touch(&root.join("usr/lib/python2.7/dist-packages").join(wheel));
        touch(&root.join("usr/lib/python3.x/dist-packages").join(wheel));
        let get = |name: &str| {
            let path = |path: &str| Some(root.join(path).into_os_string());
            match name {
                "VIRTUAL_ENV" => path("venv"),
                "CONDA_PREFIX" => path("conda"),
                "HOME" => path("home"),
                "PATH" => path("pyenv/bin"),
                "PYTHONPATH" => path("path"),
                _ => None,
            }
        };
        let found = candidates(&get, root);
        assert_eq!(found[..2], NAMES.map(PathBuf::from));
        assert_eq!(found[2..], [python_path, venv, older, user, on_path, debian, local, conda]);
    }

    #[cfg(unix)]
    #[test]
    fn the_python_behind_an_environment_is_looked_at_too() {
        let dir = tempfile::TempDir::new().unwrap();
        let root = dir.path().canonicalize().unwrap();
        let base = touch(&root.join("base/lib/python3.12/site-packages/nvidia/nccl/lib/libnccl.so.2"));
        touch(&root.join("base/bin/python3.12"));
        std::fs::create_dir_all(root.join("venv/bin")).unwrap();
        std::os::unix::fs::symlink(root.join("base/bin/python3.12"), root.join("venv/bin/python3")).unwrap();
        let get = |name: &str| (name == "PATH").then(|| root.join("venv/bin").into_os_string());
        assert_eq!(candidates(&get, &root)[2..], [base]);
    }
}
