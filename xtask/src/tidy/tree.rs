//! The text files of a repository, read once; what is built or not ours is left out.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// Folders that hold nothing written by hand.
const SKIPPED: &[&str] = &[".git", "target", "node_modules", "corpus", "artifacts"];

/// One text file; `path` is relative to the root.
pub(crate) struct TextFile {
    pub(crate) path: PathBuf,
    pub(crate) text: String,
}

impl TextFile {
    pub(crate) fn has_extension(&self, extension: &str) -> bool {
        self.path.extension().is_some_and(|own| own == extension)
    }

    /// Lines with their numbers, from 1.
    pub(crate) fn lines(&self) -> impl Iterator<Item = (usize, &str)> {
        self.text.lines().enumerate().map(|(index, line)| (index + 1, line))
    }
}

/// A repository as the rules see it.
pub(crate) struct Tree {
    root: PathBuf,
    files: Vec<TextFile>,
}

impl Tree {
    pub(crate) fn read(root: &Path) -> Result<Self> {
        let mut files = Vec::new();
        let mut folders = vec![root.to_path_buf()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(&folder).with_context(|| format!("read folder {}", folder.display()))? {
                let entry = entry?;
                let path = entry.path();
                // Links are followed to files only: a link to a folder would be read twice.
                if entry.file_type()?.is_dir() {
                    if !SKIPPED.iter().any(|skipped| entry.file_name() == *skipped) {
                        folders.push(path);
                    }
                } else if path.is_file() {
                    let bytes = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
                    // What is not UTF-8 is an image or a golden file, not for us.
                    if let Ok(text) = String::from_utf8(bytes) {
                        let path = path.strip_prefix(root).context("walked below the root")?.to_path_buf();
                        files.push(TextFile { path, text });
                    }
                }
            }
        }
        files.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(Self { root: root.to_path_buf(), files })
    }

    pub(crate) fn files(&self) -> impl Iterator<Item = &TextFile> {
        self.files.iter()
    }

    pub(crate) fn with_extension(&self, extension: &'static str) -> impl Iterator<Item = &TextFile> {
        self.files().filter(move |file| file.has_extension(extension))
    }

    pub(crate) fn file(&self, path: &Path) -> Option<&TextFile> {
        self.files().find(|file| file.path == path)
    }

    /// Whether a file or folder of any kind lies at `path`, relative to the root.
    pub(crate) fn exists(&self, path: &Path) -> bool {
        self.root.join(path).exists()
    }
}
