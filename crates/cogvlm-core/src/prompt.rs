//! Prompt templates: a question and earlier turns become one string.

use std::fmt;

use serde::{Deserialize, Serialize};

/// How a question is put to the model. Source: `_history_to_prompt` of the published model code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Template {
    /// The question alone; history is ignored.
    Base,
    /// `Question: … Answer:`
    #[default]
    Chat,
    /// `Question: … Short answer:`
    Vqa,
}

/// One earlier turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Turn {
    /// What the user asked.
    pub question: String,
    /// What the model answered.
    pub answer: String,
}

impl Template {
    /// The prompt for `query` after `history`. Nothing is trimmed, and nothing follows the last colon.
    ///
    /// ```
    /// use cogvlm_core::prompt::{Template, Turn};
    /// let history = [Turn { question: "Where?".into(), answer: "Here.".into() }];
    /// assert_eq!(Template::Vqa.render("Why?", &history), "Question: Where? Short answer: Here.\nQuestion: Why? Short answer:");
    /// assert_eq!(Template::Base.render("Why?", &history), "Why?");
    /// ```
    pub fn render(self, query: &str, history: &[Turn]) -> String {
        let answer = match self {
            Self::Base => return query.to_owned(),
            Self::Chat => "Answer:",
            Self::Vqa => "Short answer:",
        };
        let turns: String =
            history.iter().map(|turn| format!("Question: {} {answer} {}\n", turn.question, turn.answer)).collect();
        format!("{turns}Question: {query} {answer}")
    }
}

impl fmt::Display for Template {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Base => "base",
            Self::Chat => "chat",
            Self::Vqa => "vqa",
        })
    }
}
