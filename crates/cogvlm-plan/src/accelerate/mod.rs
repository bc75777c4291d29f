//! accelerate
