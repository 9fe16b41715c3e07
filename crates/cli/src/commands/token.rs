//! `godwit token`: API tokens. A secret is printed once, when it is made.

use clap::{Args, Subcommand, ValueEnum};
use godwit_api::v1::{Role, TokenCreate};
use godwit_model::{Name, TokenId};

use crate::confirm::{ConfirmArgs, each};
use crate::error::Failure;
use crate::output::{Table, note, print, print_data, word};
use crate::session::Session;
use crate::text::moment;

/// What can be done with API tokens.
#[derive(Subcommand)]
pub(crate) enum Verb {
    /// List tokens, without their secrets
    List,
    /// Make a token and print its secret, this once
    #[command(after_help = "Example:
  (umask 077; godwit token create --team web --role viewer --description monitoring > monitoring.token)")]
    Create(CreateArgs),
    /// Delete tokens; what uses them is refused from then on
    Delete {
        /// Ids, as `token list` shows them
        #[arg(required = true, value_name = "ID")]
        ids: Vec<TokenId>,
        #[command(flatten)]
        confirm: ConfirmArgs,
    },
}

/// What a new token is for.
#[derive(Args)]
pub(crate) struct CreateArgs {
    /// Its team
    #[arg(long, default_value = "default")]
    team: Name,
    /// What its bearer may do
    #[arg(long, value_enum)]
    role: RoleArg,
    /// What it is for
    #[arg(long, default_value = "", value_name = "TEXT")]
    description: String,
}

#[derive(Clone, Copy, ValueEnum)]
enum RoleArg {
    /// Everything, in every team
    Admin,
    /// Everything with the objects of its team
    Operator,
    /// Look at the objects of its team
    Viewer,
}

pub(crate) async fn run(session: Session, verb: Verb) -> Result<(), Failure> {
    match verb {
        Verb::List => {
            let tokens = session.client.tokens().await?;
            print_data(session.format, &tokens, || {
                let mut table = Table::new(&["ID", "TEAM", "ROLE", "CREATED", "DESCRIPTION"]);
                for token in &tokens {
                    let description = token.description.clone();
                    table.row([
                        token.id.to_string(),
                        token.team.to_string(),
                        word(&token.role),
                        moment(token.created),
                        description,
                    ]);
                }
                table.render()
            })
        }
        Verb::Create(CreateArgs { team, role, description }) => {
            let role = match role {
                RoleArg::Admin => Role::Admin,
                RoleArg::Operator => Role::Operator,
                RoleArg::Viewer => Role::Viewer,
            };
            let created = session.client.create_token(&TokenCreate { team, role, description }).await?;
            note(&format!("token {} was made; its secret is not shown again", created.token.id));
            print_data(session.format, &created, || created.secret.clone())
        }
        Verb::Delete { ids, confirm } => {
            if confirm.dry_run {
                let tokens = session.client.tokens().await?;
                for id in &ids {
                    let known = if tokens.iter().any(|token| token.id == *id) { "would be deleted" } else { "does not exist" };
                    print(&format!("token {id} {known}"))?;
                }
                return Ok(());
            }
            confirm.confirm(&format!("Delete {} token(s)", ids.len()))?;
            each(&ids, async |id| Ok(session.client.delete_token(*id).await?)).await
        }
    }
}
